from esvit_components.evaluation.knn.component import knn

__all__ = ["knn"]
