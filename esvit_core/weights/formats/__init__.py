"""Export backbones to other formats, one file per format; each export is verified against the original network."""
