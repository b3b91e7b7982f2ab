from esvit_components.deployment.embed.component import embed

__all__ = ["embed"]
