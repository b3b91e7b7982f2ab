"""Retraining: find new images in a source, and continue from the champion with them."""
