from esvit_components.deployment.promote.component import promote

__all__ = ["promote"]
