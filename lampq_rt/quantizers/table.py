"""Levels from a table: 2^b of the 256 codes of an 8-bit uniform grid (docs/numerics.md, "Tables").

    code8 = the uniform 8-bit code of x        level = table[code8 + 128]        x_hat = (level - zero_point) * scale

The table is non-decreasing and has at most 2^b values, so a level is what a b-bit code names. Powers of two, of the
square root of two or of any other base (FQ-ViT, RepQ-ViT, AdaLog) and two uniform ranges (PTQ4ViT) are such tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.quantizers.base import QUANTIZERS

GRID_BITS = 8
"""Width of the uniform grid that levels are chosen from."""

ENTRIES = 1 << GRID_BITS
"""Length of a table: a level for every code of the grid."""


class Table:
    """`Quantizer` whose codes are levels of the 8-bit grid; `bits` is only the table's matter.

    A method that makes levels needs the table: a plan's "input.table", which `lampq_rt.inputs` passes on.
    """

    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        *,
        weight: bool = False,
        table: Tensor | None = None,
    ) -> Tensor:
        """Levels of `x`, int32, same shape; `table` is int8 [256]."""
        return self._levels(x, scale, zero_point, table).to(torch.int32)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values of levels: (level - zero_point) * scale, fp32."""
        return (codes if zero_point is None else codes - zero_point).to(torch.float32) * scale

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        *,
        weight: bool = False,
        table: Tensor | None = None,
    ) -> Tensor:
        """`dequantize(quantize(x))`, fp32; `table` is int8 [256]."""
        if table is not None and not scale.ndim and (zero_point is None or not zero_point.ndim):
            # One step for all: 256 levels are dequantised in the place of every element, to the same bits.
            return self._read(self.dequantize(table.to(x.device, torch.int32), scale, zero_point), x, scale, zero_point)
        levels = self._levels(x, scale, zero_point, table)
        return (levels if zero_point is None else levels.sub_(zero_point)).mul_(scale)

    @staticmethod
    def _levels(x: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None) -> Tensor:
        """fp32 levels."""
        if table is None:
            raise ValueError("levels of scheme 'table' need their table; allowed: lampq_rt.inputs.quantized_input")
        return Table._read(table.to(x.device, torch.float32), x, scale, zero_point)

    @staticmethod
    def _read(values: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """fp32, as x: the one of 256 `values` that stands where the 8-bit code of each element points."""
        offset = 0.0 if zero_point is None else zero_point.to(torch.float32)
        codes = reference.round_codes(x.float(), scale.reciprocal(), offset, *reference.code_range(GRID_BITS))
        places = codes.add_(reference.OFFSET).to(torch.int32)
        return values.index_select(0, places.flatten()).view(x.shape)


def flaw(table: Tensor, bits: int) -> str | None:
    """What is wrong with a table of that width, and what is allowed; None where it is fit for use."""
    if table.dtype != torch.int8 or tuple(table.shape) != (ENTRIES,):
        return f"is {table.dtype} {tuple(table.shape)}; expected torch.int8 ({ENTRIES},)"
    steps = table[1:].short() - table[:-1].short()
    if bool((steps < 0).any()):
        return f"falls behind entry {int((steps < 0).nonzero()[0])}; a table must be non-decreasing"
    values = 1 + int((steps > 0).sum())
    return None if values <= 1 << bits else f"has {values} levels; {bits} bits name at most {1 << bits}"


QUANTIZERS.register("table")(Table())
