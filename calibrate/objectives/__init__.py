"""What the error of a block's output counts in training. One file each, behind the protocol in `base`."""

from lampq_rt.calibrate.objectives import aph, fisher, mse, suffix, tokens  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, First, Objective, Study

__all__ = ["OBJECTIVES", "BlockError", "First", "Objective", "Study"]
