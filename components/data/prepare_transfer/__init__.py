from esvit_components.data.prepare_transfer.component import prepare_transfer

__all__ = ["prepare_transfer"]
