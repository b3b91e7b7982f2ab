from esvit_components.evaluation.take_backbone.component import take_backbone

__all__ = ["take_backbone"]
