from esvit_components.data.find_new_data.component import find_new_data

__all__ = ["find_new_data"]
