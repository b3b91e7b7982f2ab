from esvit_components.evaluation.visualize.component import visualize

__all__ = ["visualize"]
