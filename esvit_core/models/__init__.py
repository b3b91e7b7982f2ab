"""Backbones and heads."""

from esvit_core.models.factory import architecture_names, create_backbone
from esvit_core.models.heads import ProjectionHead
from esvit_core.models.multicrop import MultiCropNetwork, NetworkOutput, build_student_teacher

__all__ = [
    "MultiCropNetwork",
    "NetworkOutput",
    "ProjectionHead",
    "architecture_names",
    "build_student_teacher",
    "create_backbone",
]
