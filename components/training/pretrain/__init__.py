from esvit_components.training.pretrain.component import pretrain

__all__ = ["pretrain"]
