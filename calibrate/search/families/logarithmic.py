"""Levels s * 2^(-k e), k = 0, 1, ...: powers of a base 2^e, which stand close where values are small.

Behind a GELU nearly all values are positive, and the formula wants none below 0: AdaLog (2407.12951, section 3.2) adds
what the least value lacks to 0, so levels start from there. b bits then name 2^b powers, or 2^b - 1 powers and the
least value itself; the published quantiser has one value more than b bits name, 2^b powers and that. Inputs with two
tails, for which nothing is published, have 2^(b-1) powers on either side of 0.

s is every whole number of the grid's steps. The multiplier of b + 1 bits to which AdaLog rounds a power is here the
8-bit grid itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lampq_rt.calibrate.search.families.base import HIGHEST, LOWEST, Best, span

ONE_SIDED = 0.25
"""An input has one tail if the other is at most this long beside it."""


class Logarithmic:
    """Family of powers of a few bases.

    Args:
        exponents: e of every base 2^e.
    """

    def __init__(self, exponents: Sequence[float]) -> None:
        self.exponents = exponents

    def __call__(self, histogram: Tensor, zero: int, bits: int) -> Tensor:
        """See `Family`."""
        best = Best(histogram)
        lowest, highest = span(histogram)
        one_sided = zero - lowest <= ONE_SIDED * (highest - zero)
        sizes = torch.arange(1, HIGHEST - LOWEST + 1, dtype=torch.float64)[:, None]
        for exponent in self.exponents:
            powers = sizes * torch.exp2(-exponent * torch.arange(1 << bits, dtype=torch.float64))  # [sizes, 2^bits]
            if one_sided:
                best.offer(lowest + powers)
                powers[:, -1] = 0.0
                best.offer(lowest + powers)
            else:
                half = powers[:, : 1 << (bits - 1)]
                best.offer(torch.cat((zero - half, zero + half), 1))
        return best.table()
