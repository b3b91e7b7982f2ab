from esvit_components.evaluation.pictures.component import pictures

__all__ = ["pictures"]
