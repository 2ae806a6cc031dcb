"""The levels of a table format: which 2^b of the 256 codes of an 8-bit grid stand for all (docs/numerics.md, "Tables").

A histogram of the 8-bit codes, each value weighted by what the layer's output makes of its error, is cut into 2^b
intervals of least weighted squared error by dynamic programming: the optimal scalar quantiser (Lloyd 1982, Max 1960)
whose levels lie on the grid. Logarithmic, twin-uniform and adaptive-base formats (FQ-ViT, RepQ-ViT, PTQ4ViT, AdaLog)
choose among fewer such tables (`families`), so none of them has less error by this measure.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lampq_rt.quantizers.table import ENTRIES

CODES = ENTRIES


def best_table(histogram: Tensor, bits: int) -> Tensor:
    """int8 [256]: the level of each 8-bit code, at most 2^bits different ones, in rising order.

    Args:
        histogram: [256], the weight of each code, from -128 on.
        bits: 1..7.
    """
    mass = histogram.double().cpu().numpy() + 1e-12 * float(histogram.sum() + 1e-30)  # every code has its interval
    codes = np.arange(CODES) - CODES // 2
    sums = [np.concatenate(([0.0], np.cumsum(mass * codes**power))) for power in range(3)]
    # Of codes i..j-1 together: weight, first and second moment, and the whole number nearest to their mean.
    m0, m1, m2 = (s[None, :] - s[:, None] for s in sums)
    level = np.rint(np.divide(m1, m0, out=np.zeros_like(m1), where=m0 > 0))
    cost = np.where(np.tri(CODES + 1, k=0, dtype=bool), np.inf, m2 - 2 * level * m1 + level**2 * m0)
    best = cost[0].copy()  # one interval up to j
    cuts = []
    for _ in range((1 << bits) - 1):
        total = best[:, None] + cost
        cuts.append(total.argmin(0))
        best = np.minimum(total.min(0), np.inf)
    table = np.empty(CODES, dtype=np.int8)
    stop = CODES
    for cut in reversed([np.zeros(CODES + 1, dtype=np.int64), *cuts]):
        start = int(cut[stop])
        table[start:stop] = int(level[start, stop])
        stop = start
    return torch.from_numpy(table)


def code_histogram(codes: Tensor, row_worth: Tensor, column_worth: Tensor) -> Tensor:
    """fp64 [256]: weight of each 8-bit code.

    Args:
        codes: whole numbers -128..127, any dtype, [R, K].
        row_worth: [R].
        column_worth: [K].
    """
    bins = (codes.long() + CODES // 2).flatten().cpu()
    worth = torch.outer(row_worth.double().cpu(), column_worth.double().cpu())
    return torch.bincount(bins, worth.flatten(), CODES)
