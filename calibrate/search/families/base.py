"""What a family of levels must do, and how the best of many candidates is found.

A family is a published number format of 2^b values, say powers of a base. Its members differ in a few parameters; each
is rounded to the 8-bit grid on which a table's levels lie (docs/numerics.md, "Tables"), and the member of least
weighted squared error over a histogram of 8-bit codes is taken. Every code takes the level nearest to it. A format that
rounds otherwise (logarithms round the exponent) has the same levels and at least that error.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.quantizers.table import ENTRIES, GRID_BITS
from lampq_rt.registry import Registry

LOWEST, HIGHEST = reference.code_range(GRID_BITS)
"""Codes of the grid."""


class Family(Protocol):
    """A rule that says which levels may stand together."""

    def __call__(self, histogram: Tensor, zero: int, bits: int) -> Tensor:
        """The table of least weighted squared error.

        Args:
            histogram: [256], the weight of each 8-bit code, from -128 on.
            zero: the code of real 0, -128..127.
            bits: 2..7.

        Returns:
            int8 [256]: the level of each code, at most 2^bits different ones, in rising order.
        """
        ...


FAMILIES: Registry[Family] = Registry("family of levels")


def span(histogram: Tensor) -> tuple[int, int]:
    """Lowest and highest code that has weight; the whole grid where none has."""
    filled = histogram.flatten().nonzero().flatten()
    return (LOWEST, HIGHEST) if not len(filled) else (int(filled[0]) + LOWEST, int(filled[-1]) + LOWEST)


class Best:
    """The best levels of those offered; among equals, the first.

    Args:
        histogram: [256], the weight of each 8-bit code, from -128 on.
    """

    def __init__(self, histogram: Tensor) -> None:
        codes = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64)
        mass = histogram.double().cpu()
        moments = torch.stack([mass, mass * codes, mass * codes.square()])
        self.sums = torch.cat((torch.zeros(3, 1, dtype=torch.float64), moments.cumsum(1)), 1)  # [3, 257], up to a code
        self.error = float("inf")
        self.levels = torch.zeros(1, dtype=torch.int64)

    def offer(self, candidates: Tensor) -> None:
        """Real levels in units of the grid, [..., L] in any order; rounded to the grid here, and left out beyond it.

        (At the grid's end they would be levels that the formula does not have: GELU's minimum, for one.)
        """
        levels = candidates.double().round().long().flatten(0, -2).sort(1).values
        inside = (levels >= LOWEST) & (levels <= HIGHEST)
        levels, inside = levels[inside.any(1)], inside[inside.any(1)]
        low = levels.masked_fill(~inside, HIGHEST).amin(1, keepdim=True)
        high = levels.masked_fill(~inside, LOWEST).amax(1, keepdim=True)
        levels = levels.clamp(low, high)
        errors = self._errors(levels)
        least = int(errors.argmin())
        if float(errors[least]) < self.error:
            self.error, self.levels = float(errors[least]), levels[least]

    def _errors(self, levels: Tensor) -> Tensor:
        """fp64 [C]: weighted squared error of levels [C, L], in rising order."""
        ends = torch.empty(len(levels), levels.shape[1] + 1, dtype=torch.int64)
        ends[:, 0], ends[:, -1] = 0, ENTRIES
        ends[:, 1:-1] = _highest_of_lower(levels) + 1 - LOWEST
        weight, first, second = (total[ends].diff(dim=1) for total in self.sums)
        return (second - 2 * levels * first + levels.square() * weight).sum(1)

    def table(self) -> Tensor:
        """int8 [256]: every code's nearest level, the lower one of two."""
        codes = torch.arange(LOWEST, HIGHEST + 1)
        return self.levels[torch.searchsorted(_highest_of_lower(self.levels), codes)].to(torch.int8)


def _highest_of_lower(levels: Tensor) -> Tensor:
    """int64 [..., L - 1]: of two neighbouring levels, the highest code that is nearer to the lower one, or as near."""
    return (levels[..., :-1] + levels[..., 1:]).div(2, rounding_mode="floor")
