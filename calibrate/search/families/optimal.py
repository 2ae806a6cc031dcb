"""Any levels: the optimal ones, by dynamic programming (`search.table`). No other family has less error."""

from __future__ import annotations

from torch import Tensor

from lampq_rt.calibrate.search.families.base import FAMILIES
from lampq_rt.calibrate.search.table import best_table


@FAMILIES.register("optimal")
def optimal(histogram: Tensor, zero: int, bits: int) -> Tensor:
    """See `Family`."""
    return best_table(histogram, bits)
