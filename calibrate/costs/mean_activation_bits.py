"""Mean width of the blocks' activations, each counted as often as it is multiplied.

The input of a linear takes part in tokens x K x N products, q and k in tokens^2 x D of QK^T, softmax output and v in
as many of PV. So it is the A of a WbAb, as `mean_bits` is the W: with weight and input of one width at every linear,
and attention at the mean, both are equal (all linears of the blocks see the same tokens).
"""

from __future__ import annotations

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate.costs.base import COSTS
from lampq_rt.sites import BLOCK_LINEARS, Description, Site


@COSTS.register("mean_activation_bits")
class MeanActivationBits:
    """Sum of macs x bits of activations over the blocks' sites, over their macs; other sites cost nothing. Unit: bits.

    A matmul of two activations counts the mean of their widths; 16 stands for floating point.
    """

    full = 32.0
    constant = 0.0

    def __init__(self, model: nn.Module, description: Description) -> None:
        self.macs = sum(site.macs for site in description.sites if _counts(site))

    def of(self, site: Site, formats: Formats) -> float:
        """See `Cost.of`."""
        if not _counts(site):
            return 0.0
        widths = [formats[operand].bits for operand in site.operands if operand != "weight"]
        return site.macs * sum(widths) / len(widths) / self.macs


def _counts(site: Site) -> bool:
    return site.kind in BLOCK_LINEARS or site.is_matmul
