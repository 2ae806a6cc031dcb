"""Uniform codes: real = (code - zero_point) * scale (docs/numerics.md, rules 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.quantizers.base import QUANTIZERS


class Uniform:
    """The uniform quantizer of the numerics contract; the arithmetic itself is the reference's."""

    def quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """See `Quantizer.quantize`."""
        return self._codes(x, scale, zero_point, bits, weight).to(torch.int32)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See `Quantizer.dequantize`."""
        offset = codes if zero_point is None else codes - zero_point
        return offset.to(torch.float32) * scale

    def fake_quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        codes = self._codes(x, scale, zero_point, bits, weight)
        return (codes if zero_point is None else codes.sub_(zero_point)).mul_(scale)

    @staticmethod
    def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, weight: bool) -> Tensor:
        low, high = reference.code_range(bits, weight=weight)
        offset = 0.0 if zero_point is None else zero_point.to(torch.float32)
        return reference.round_codes(x, scale.reciprocal(), offset, low, high)


QUANTIZERS.register("uniform")(Uniform())
