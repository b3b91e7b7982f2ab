"""Features of new images by a published backbone, streamed to a file: views, and regions where asked for."""
