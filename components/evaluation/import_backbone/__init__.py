from esvit_components.evaluation.import_backbone.component import import_backbone

__all__ = ["import_backbone"]
