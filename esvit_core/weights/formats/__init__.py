"""Backbones in the formats of other tools, a file per format; each export is compared with the network it came from."""
