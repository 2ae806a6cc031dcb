"""Plans for timing: steps from the range of random images. Latency does not depend on the weights or the steps."""

from __future__ import annotations

import torch
from torch import nn

from lampq_rt.calibrate import Budget, calibrate
from lampq_rt.plan import Plan, SiteParams

IMAGES = 2


def range_plan(model: nn.Module, bits: int | None, input_bits: int | None) -> Plan:
    """A plan with every linear at `bits` and its input at `input_bits`; None: widths 4 and 8 in turn (mixed)."""
    raise NotImplementedError
