"""Softmax output whose row maximum has the top code (docs/numerics.md, rule 7).

The codes are of the unnormalised exponentials e = exp2(logit - rowmax) in (0, 1]; the row sum stays in fp32 and
divides the matmul's result. The step is 1/(2^bits - 1) for every tensor, so there is nothing to calibrate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.quantizers.base import QUANTIZERS


class RowMax:
    """Codes 0..2^bits-1 of exponentials in [0, 1]; `scale` and `zero_point` are ignored: the format fixes them."""

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Codes of `x` in [0, 1], int32."""
        return (x * float(2**bits - 1)).round().to(torch.int32)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values, fp32; `scale` must be 1/(2^bits - 1)."""
        return codes.to(torch.float32) * scale

    def fake_quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Quantise and return to [0, 1], fp32."""
        top = float(2**bits - 1)
        return (x * top).round_().div_(top)


QUANTIZERS.register("rowmax")(RowMax())
