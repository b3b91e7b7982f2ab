from esvit_components.evaluation.visualize.component import pictures

__all__ = ["pictures"]
