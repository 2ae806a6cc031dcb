"""What a number format must be able to do, and the registry of those that exist."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lampq_rt.registry import Registry


class Quantizer(Protocol):
    """Turns real values into codes and back. Steps are given, never searched: that is `calibrate/search`'s work."""

    def quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Codes of `x`, int32, same shape.

        Args:
            x: fp32, any shape.
            scale: fp32 steps, broadcastable to `x`.
            zero_point: int32, broadcastable to `x`; None for a symmetric format.
            bits: width of a code.
            weight: True leaves out -128 at 8 bits.
        """
        ...

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values of integer `codes`: (code - zero_point) * scale, fp32."""
        ...

    def fake_quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """`dequantize(quantize(x))`, fp32, without leaving floating point."""
        ...


QUANTIZERS: Registry[Quantizer] = Registry("number format")
