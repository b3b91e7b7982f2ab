"""Weights from elsewhere: files that the published code, timm or another run wrote, and how they go into a network."""
