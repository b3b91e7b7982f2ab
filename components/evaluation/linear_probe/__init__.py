from esvit_components.evaluation.linear_probe.component import linear_probe

__all__ = ["linear_probe"]
