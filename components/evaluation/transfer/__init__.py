from esvit_components.evaluation.transfer.component import transfer

__all__ = ["transfer"]
