"""Plans for timing: latency depends on widths and shapes, not on weights or steps."""

from __future__ import annotations

import torch
from torch import nn

from lampq_rt.plan import Plan
from lampq_rt.standin import stand_in_plan

MIXED = {"qkv": 8, "proj": 4, "fc1": 8, "fc2": 4, "default": 8}


def timing_plan(model: nn.Module, bits: int | None, input_bits: int | None) -> Plan:
    """All linears at `bits`, inputs at `input_bits`; None: wide qkv and fc1, narrow proj and fc2, as LampQ chooses."""
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    widths = MIXED if bits is None else {"default": bits, "qk": 8, "pv": 8, "head": 8}
    return stand_in_plan(model, images, widths, input_bits=input_bits)
