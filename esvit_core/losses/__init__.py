"""The objective of the paper."""

from esvit_core.losses.center import Center
from esvit_core.losses.objective import Objective, ObjectiveTerms
from esvit_core.losses.region import region_loss
from esvit_core.losses.view import view_loss

__all__ = ["Center", "Objective", "ObjectiveTerms", "region_loss", "view_loss"]
