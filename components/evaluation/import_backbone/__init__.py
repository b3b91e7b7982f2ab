from esvit_components.evaluation.import_backbone.component import take_backbone

__all__ = ["take_backbone"]
