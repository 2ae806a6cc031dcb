"""What a width costs in accuracy. One penalty a file, behind the protocol in `base`."""

from lampq_rt.calibrate.metrics import alone, exponential, fisher_output, measured, trace_dw  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.metrics.base import PENALTIES, Curves, Evidence, Penalty, Score

__all__ = ["PENALTIES", "Curves", "Evidence", "Penalty", "Score"]
