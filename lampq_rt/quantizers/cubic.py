"""Softmax output whose codes are of its cube root (docs/numerics.md, rule 7).

The codes are of t = e^(1/3), where e = exp2(logit - rowmax) in (0, 1] are the unnormalised exponentials: code =
rne(n t) with n = 2^bits - 1, value rne(255 (code / n)^3) / 255. So steps are fine where most weights of a row lie, near
0, as with a compander in telephony; PowerQuant (2301.09858) searches such exponents. What multiplies v is an unsigned
byte whatever the width: one integer matmul, where `log2` of 4 bits needs two on a CPU. There is nothing to calibrate.
"""

from __future__ import annotations

from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.quantizers.base import QUANTIZERS

UNIT = reference.softmax_unit(2, "cubic")
"""The weight of 1, at every width."""


class Cubic:
    """Codes 0..2^bits-1 of the cube roots of exponentials in [0, 1], 2..7 bits.

    `scale` counts in `dequantize` alone, where it says the width, and `zero_point` nowhere: the format fixes them.
    """

    def quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Codes of `x` in [0, 1], int32."""
        return self._codes(x, bits).int()

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Real values, fp32; `scale` must be 1/(2^bits - 1)."""
        return reference.cube_weights(codes.float(), round(1 / float(scale))).div_(UNIT)

    def fake_quantize(
        self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, bits: int, *, weight: bool = False
    ) -> Tensor:
        """Quantise and return to [0, 1], fp32."""
        return reference.cube_weights(self._codes(x, bits), 2**bits - 1).div_(UNIT)

    @staticmethod
    def _codes(x: Tensor, bits: int) -> Tensor:
        """fp32 codes."""
        return x.pow(1 / 3).mul_(2**bits - 1).round_()


QUANTIZERS.register("cubic")(Cubic())
