from esvit_components.evaluation.extract_features.component import extract_features

__all__ = ["extract_features"]
