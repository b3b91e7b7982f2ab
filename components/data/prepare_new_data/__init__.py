from esvit_components.data.prepare_new_data.component import prepare_new_data

__all__ = ["prepare_new_data"]
