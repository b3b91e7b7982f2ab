from esvit_components.reporting.report.component import report

__all__ = ["report"]
