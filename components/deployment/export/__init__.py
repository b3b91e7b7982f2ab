from esvit_components.deployment.export.component import export

__all__ = ["export"]
