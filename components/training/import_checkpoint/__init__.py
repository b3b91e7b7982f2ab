from esvit_components.training.import_checkpoint.component import import_checkpoint

__all__ = ["import_checkpoint"]
