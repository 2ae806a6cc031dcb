"""Levels of a weight: 2^b whole numbers on the 8-bit grid, which need not lie at equal distances (docs/numerics.md).

    code = the level nearest to w / scale        w_hat = levels[code + 2^(b-1)] * scale

Weights crowd around 0, so equal distances waste codes on tails: of normally distributed numbers the best 16 levels
leave a fifth less squared error than 16 equally spaced ones, of Laplacian numbers two fifths (Lloyd 1982; NF4 of QLoRA,
2305.14314, fixes such levels once for all; PowerQuant, 2301.09858, takes powers). Here every linear has its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.quantizers.base import QUANTIZERS

TOP = 127
"""Largest magnitude of a level: weights leave out -128 (rule 2)."""


class Levels:
    """`Quantizer` of weights; every method needs the levels: a plan's "weight.levels", int8 [2^bits], rising."""

    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        *,
        weight: bool = False,
        levels: Tensor | None = None,
    ) -> Tensor:
        """Codes -2^(bits-1) ... of `x`, int32, same shape; halfway between two levels, the lower one."""
        return nearest(x * scale.reciprocal(), _given(levels)).add_(reference.code_range(bits)[0])

    def dequantize(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, levels: Tensor | None = None
    ) -> Tensor:
        """Real values of codes, fp32."""
        return of_codes(codes, _given(levels)).to(torch.float32) * scale

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        *,
        weight: bool = False,
        levels: Tensor | None = None,
    ) -> Tensor:
        """`dequantize(quantize(x))`, fp32."""
        table = _given(levels).to(x.device)
        return table.float()[nearest(x * scale.reciprocal(), table).long()] * scale


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """int32, the place of the level nearest to each of `x`, fp32 in units of the step; the lower of two equally near.

    Args:
        x: fp32, any shape.
        levels: [L], rising.
    """
    middles = levels.to(x.device, torch.float32)
    middles = (middles[1:] + middles[:-1]) / 2  # exact: of whole numbers
    return torch.bucketize(x, middles, out_int32=True)


def of_codes(codes: Tensor, levels: Tensor) -> Tensor:
    """int8: the level that each signed code names; `levels` int8 [L]."""
    table = levels.to(codes.device)
    return table[(codes.to(torch.int16) + len(levels) // 2).long()]


def codes_of(values: Tensor, levels: Tensor) -> Tensor:
    """int8: undo `of_codes`.

    Raises:
        ValueError: a value is no level.
    """
    table = levels.to(values.device)
    places = torch.searchsorted(table, values).clamp_(max=len(table) - 1)
    if not torch.equal(table[places], values):
        raise ValueError("a weight holds values that are none of its levels")
    return (places - len(table) // 2).to(torch.int8)


def flaw(levels: Tensor, bits: int) -> str | None:
    """What is wrong with the levels of that width, and what is allowed; None where they are fit for use."""
    if levels.dtype != torch.int8 or tuple(levels.shape) != (1 << bits,):
        return f"is {levels.dtype} {tuple(levels.shape)}; expected torch.int8 ({1 << bits},)"
    if int(levels.min()) < -TOP:
        return f"holds {int(levels.min())}; allowed: -{TOP}..{TOP}"
    falls = levels[1:].short() <= levels[:-1].short()
    return f"does not rise at entry {int(falls.nonzero()[0]) + 1}; levels must rise" if bool(falls.any()) else None


def _given(levels: Tensor | None) -> Tensor:
    if levels is None:
        raise ValueError("scheme 'levels' needs its levels; allowed: lampq_rt.weights.weight_codes")
    return levels


QUANTIZERS.register("levels")(Levels())
