from esvit_components.evaluation.compare_champion.component import compare_champion

__all__ = ["compare_champion"]
