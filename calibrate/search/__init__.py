"""How steps are chosen: one search a file, behind the protocol in `base`, and the clip of weights."""

from lampq_rt.calibrate.search import fpcs, minmax, output_error, percentile  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.search.base import SEARCHES, RangeSearch, Steps
from lampq_rt.calibrate.search.weight_levels import weight_steps
from lampq_rt.calibrate.search.weight_mse import weight_scale

__all__ = ["SEARCHES", "RangeSearch", "Steps", "weight_scale", "weight_steps"]
