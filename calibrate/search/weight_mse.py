"""Steps of weights: per output channel, symmetric, the clip of least squared error.

Every clip c in a fixed grid of fractions of the channel's largest absolute value is tried: step = c / top code, error =
sum_k (w_hat - w)^2. Rows are taken in blocks that stay in the processor's cache, where the whole sweep runs in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate.search.base import symmetric_scale
from lampq_rt.kernels import reference

CLIPS = 80
"""Clips tried per channel."""

_LOWEST_CLIP = {2: 0.04, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4, 7: 0.5, 8: 0.6}
"""Smallest clip, as a fraction of the channel's largest absolute value, by bits."""

_BLOCK = 1 << 15
"""Elements swept at once: few enough for the cache, and for torch not to wake its other threads thousands of times."""


def clip_factors(bits: int) -> Tensor:
    """fp64 [CLIPS], ascending, the last one 1: fractions of the largest absolute value."""
    return torch.linspace(_LOWEST_CLIP[bits], 1.0, CLIPS, dtype=torch.float64)


@torch.no_grad()
def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The step of each output channel that makes the squared error of the channel least.

    Args:
        weight: fp32 [N, ...], finite; each of the N rows is one channel.
        bits: width of a code, 2..8.

    Returns:
        fp32 [N], positive and finite. A channel of zeros gets step 1.
    """
    rows = weight.flatten(1).float()
    max_abs = rows.abs().amax(1).double()
    scales = symmetric_scale(max_abs * clip_factors(bits).to(rows.device)[:, None], bits)  # [CLIPS, N]
    block = max(1, _BLOCK // rows.shape[1])
    best = [_best_clip(w, s, bits) for w, s in zip(rows.split(block), scales.split(block, 1), strict=True)]
    return torch.cat(best)


def _best_clip(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """fp32 [n]: of the steps [CLIPS, n], the best of each of the rows [n, K]; among equals, the widest clip."""
    low, high = reference.code_range(bits, weight=True)
    error = torch.empty_like(rows)
    least = torch.full_like(scales[0], float("inf"))
    best = scales[-1].clone()
    for scale in scales.flip(0):
        torch.mul(rows, scale.reciprocal()[:, None], out=error)
        error.round_().clamp_(low, high).mul_(scale[:, None]).sub_(rows)
        squared = torch.linalg.vector_norm(error, dim=1)
        better = squared < least
        least = torch.where(better, squared, least)
        best = torch.where(better, scale, best)
    return best
