"""Softmax output as powers of two (docs/numerics.md, rule 7).

The base-2 quantiser of FQ-ViT (2111.13824), which RepQ-ViT (2212.08254) and AdaLog (2407.12951) build on, applied to
the unnormalised exponentials e = exp2(logit - rowmax) in (0, 1]: code = rne(-log2 e), value 2^-code, and 0 where the
code is 2^bits or more. That zero is a value beside the 2^bits codes; P never leaves a kernel, so it costs no memory.
Relative precision is the same for small weights as for large ones, where `rowmax` loses all below 2^-(bits + 1).
There is nothing to calibrate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.quantizers.base import QUANTIZERS

ZERO = 255
"""The code that stands for the value 0; 2^-255 is 0 in fp32."""


class Log2:
    """Codes 0..2^bits-1, or `ZERO`, of exponentials in [0, 1], at most 4 bits.

    `scale` and `zero_point` are ignored: the format fixes them.
    """

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Codes of `x` in [0, 1], int32; halves round to even."""
        codes = x.log2().neg().round()
        return torch.where(codes < 1 << bits, codes, ZERO).to(torch.int32)

    def dequantize(self, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        """Real values 2^-code, fp32."""
        return torch.exp2(-codes.to(torch.float32))

    def fake_quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Quantise and return to [0, 1], fp32."""
        codes = x.log2().neg_().round_()
        return torch.where(codes < 1 << bits, torch.exp2(-codes), 0.0)


QUANTIZERS.register("log2")(Log2())
