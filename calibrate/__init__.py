"""The calibrator: from a model, a few images and a budget to a `Plan` (offline; a serving host does not need it).

from lampq_rt.calibrate import Budget, make_plan

plan = make_plan(model, images, budget=Budget(mean_bits=4))
"""

from lampq_rt.calibrate.costs import COSTS, Budget
from lampq_rt.calibrate.pipeline import Calibration, calibrate, make_plan
from lampq_rt.calibrate.prepare import Material
from lampq_rt.calibrate.recipes import RECIPES, Recipe

__all__ = ["COSTS", "RECIPES", "Budget", "Calibration", "Material", "Recipe", "calibrate", "make_plan"]
