"""Levels at equal distance, 0 among them: what b uniform bits give, but rounded to the 8-bit grid."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate.search.families.base import FAMILIES, HIGHEST, LOWEST, Best


@FAMILIES.register("uniform")
def uniform(histogram: Tensor, zero: int, bits: int) -> Tensor:
    """See `Family`. The range's length is every whole number of the grid's steps, 0 each of the codes."""
    best = Best(histogram)
    codes = torch.arange(1 << bits, dtype=torch.float64)
    steps = torch.arange(1, HIGHEST - LOWEST + 1, dtype=torch.float64)[:, None] / codes[-1]
    for place in codes:
        best.offer(zero + steps * (codes - place))
    return best.table()
