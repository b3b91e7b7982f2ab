"""The default container image of the steps.

A pipeline sets the image of its configuration on every task; a component used on its own runs in this one.
"""

from esvit_core.config import ClusterConfig

BASE_IMAGE = ClusterConfig().image
