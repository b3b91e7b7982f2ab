"""Load, save and import weights, from the published code, timm or another run."""
