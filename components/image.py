"""The image that the steps run in: the one that the configuration names by default.

The pipeline sets the image of the run's own configuration on every task; this is what a component by itself has.
"""

from esvit_core.config import ClusterConfig

BASE_IMAGE = ClusterConfig().image
