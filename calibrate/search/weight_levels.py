"""Levels of a weight and steps of its channels, by turns (docs/numerics.md, "Levels of weights").

All channels share the levels, each has its step. With the steps given, the best levels are those of a table: the
optimal scalar quantiser on the 8-bit grid, over the histogram of all channels' weights in units of their steps
(`table.best_table`; Lloyd 1982, Max 1960). With the levels given, a channel's best step follows from which level each
of its weights takes: sum(w l) / sum(l l). Both lower the same squared error, so the turns settle.

Of 1 bit the levels are -127 and 127, and a step is the mean of |w| / 127, the best of -a, a in each channel (XNOR-Net,
1603.05279): two levels found as above go after the outliers of a few channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate.search.table import CODES, best_table
from lampq_rt.calibrate.search.weight_mse import weight_scale
from lampq_rt.formats import Format
from lampq_rt.quantizers.levels import TOP, nearest

TURNS = 3
"""Of levels and steps; three more lower the error by less than a hundredth."""

NEXT_TO_NOTHING = 1e-12
"""Step of a channel of zeros: levels need not have 0 among them. Its product with an input's step is no denormal."""

REACH = 1.3
"""How far out the outermost level begins, in best clips of equal distances: unequal ones reach further."""


def weight_steps(weight: Tensor, fmt: Format) -> dict[str, Tensor]:
    """Steps, and levels where the format has them, of a weight fp32 [N, ...], by key of a plan."""
    if fmt.scheme != "levels":
        return {"weight.scale": weight_scale(weight, fmt.bits)}
    scale, levels = weight_levels(weight, fmt.bits)
    return {"weight.scale": scale, "weight.levels": levels}


@torch.no_grad()
def weight_levels(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Steps and levels of least squared error, found by turns.

    Args:
        weight: fp32 [N, ...], finite; each of the N rows is one channel.
        bits: width of a code, 1..7.

    Returns:
        fp32 [N], positive and finite, and int8 [2^bits], rising, within -127..127. A channel of zeros gets step
        `NEXT_TO_NOTHING`.
    """
    rows = weight.flatten(1).float()
    if bits == 1:
        scale = (rows.abs().mean(1) / TOP).clamp_min(NEXT_TO_NOTHING)
        return scale, torch.tensor([-TOP, TOP], dtype=torch.int8, device=rows.device)
    clip = weight_scale(rows, bits) * (1 << bits - 1)
    scale, levels = clip * (REACH / TOP), torch.empty(0)
    scale[rows.abs().amax(1) == 0.0] = NEXT_TO_NOTHING
    for _ in range(TURNS):
        levels = _levels(rows, scale, bits)
        scale = _steps(rows, scale, levels)
    return scale, levels.to(torch.int8)


def _levels(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """fp32 [2^bits], rising; an error counts in units of the weight, so a channel's codes count its step squared."""
    codes = (rows / scale[:, None]).round_().clamp_(-TOP, TOP).add_(CODES // 2).long()
    places = codes.add_((torch.arange(len(rows), device=rows.device) * CODES)[:, None])
    counts = torch.bincount(places.flatten(), minlength=len(rows) * CODES).view(len(rows), CODES)
    histogram = scale.double().square() @ counts.double()
    found = torch.unique(best_table(histogram, bits)).to(torch.int16)
    return _filled(found, 1 << bits).to(rows.device, torch.float32)


def _filled(levels: Tensor, count: int) -> Tensor:
    """`levels`, rising, with unused ones put between until there are `count`: a weight of few values needs fewer."""
    levels = levels.clamp(-TOP, TOP).unique()
    while len(levels) < count:
        free = torch.tensor(sorted(set(range(-TOP, TOP + 1)) - set(levels.tolist())), dtype=levels.dtype)
        levels = torch.cat((levels, free[: count - len(levels)])).sort().values
    return levels


def _steps(rows: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """fp32 [N]: each channel's best step for the levels that its weights take with `scale`."""
    taken = levels[nearest(rows / scale[:, None], levels).long()]
    best = (rows * taken).sum(1) / taken.square().sum(1)
    return torch.where(best.isfinite() & (best > 0.0), best, scale)
