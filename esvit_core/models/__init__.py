"""Backbones and heads."""

from esvit_core.models.heads import ProjectionHead
from esvit_core.models.multicrop import MultiCropNetwork, NetworkOutput, build_student_teacher
from esvit_core.models.registry import architecture_names, create_backbone

__all__ = [
    "MultiCropNetwork",
    "NetworkOutput",
    "ProjectionHead",
    "architecture_names",
    "build_student_teacher",
    "create_backbone",
]
