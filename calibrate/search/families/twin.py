"""Two uniform ranges that meet at 0, whose steps differ by a power of two.

PTQ4ViT (2111.12293, section 3.2) gives half of the codes to a GELU's negative outputs, in steps of d, and half to the
positive ones, in steps of 2^m d, so that a shift aligns the two; MPTQ-ViT (2401.14895) finds m by search. Both halves
name 0. Here the larger range's end is every whole number of the grid's steps, and m any of a few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate.search.families.base import FAMILIES, HIGHEST, LOWEST, Best

SHIFTS = range(-7, 8)
"""m: the positive values' step is 2^m times that of the negative ones."""


@FAMILIES.register("twin")
def twin(histogram: Tensor, zero: int, bits: int) -> Tensor:
    """See `Family`."""
    best = Best(histogram)
    codes = torch.arange(1 << (bits - 1), dtype=torch.float64)
    longer = torch.arange(1, HIGHEST - LOWEST + 1, dtype=torch.float64)[:, None] * codes / codes[-1]
    for shift in SHIFTS:
        shorter = longer * 2.0 ** -abs(shift)
        negative, positive = (shorter, longer) if shift >= 0 else (longer, shorter)
        best.offer(torch.cat((zero - negative, zero + positive), 1))
    return best.table()
