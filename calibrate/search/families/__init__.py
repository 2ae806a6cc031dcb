"""Which levels a table may have: one family a file, behind the protocol in `base`."""

from lampq_rt.calibrate.search.families import adalog, log_sqrt2, optimal, twin, uniform  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.search.families.base import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
