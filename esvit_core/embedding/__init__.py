"""Compute features of new images with a published backbone, streamed to a file: view features, optionally regions."""
