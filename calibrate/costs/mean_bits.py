"""Mean width of the weights of the blocks' linears, by parameters: LampQ's budget (AAAI-26, section 4.3)."""

from __future__ import annotations

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate.costs.base import COSTS
from lampq_rt.sites import BLOCK_LINEARS, Description, Site


@COSTS.register("mean_bits")
class MeanBits:
    """Sum of params x bits over the blocks' linears, over their parameters; other sites cost nothing. Unit: bits."""

    full = 32.0
    constant = 0.0

    def __init__(self, model: nn.Module, description: Description) -> None:
        self.params = sum(site.params for site in description.sites if site.kind in BLOCK_LINEARS)

    def of(self, site: Site, formats: Formats) -> float:
        """See `Cost.of`. The weight's width is counted; `mean_activation_bits` counts the input's."""
        return site.params * formats["weight"].bits / self.params if site.kind in BLOCK_LINEARS else 0.0
