"""Bit-operations per image: multiply-accumulates x bits of one operand x bits of the other, as HAWQ-V3 counts them."""

from __future__ import annotations

import math

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate.costs.base import COSTS
from lampq_rt.sites import Description, Site

FP32_BITS = 32


@COSTS.register("bops")
class BitOperations:
    """Linears, patch embedding, head and both attention matmuls; LayerNorm, softmax and GELU are not counted."""

    constant = 0.0

    def __init__(self, model: nn.Module, description: Description) -> None:
        self.full = float(sum(site.macs for site in description.sites) * FP32_BITS**2)

    def of(self, site: Site, formats: Formats) -> float:
        """See `Cost.of`."""
        return float(site.macs * math.prod(formats[operand].bits for operand in site.operands))
