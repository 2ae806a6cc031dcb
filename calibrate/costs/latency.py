"""Milliseconds of a batch on the machine that a latency table was made on, and the speed-up over floating point there.

A site's cost is what its ops take more or less than at 8 bits; where the formats of two neighbours decide together
(a quantisation between floating point and codes, a fusion that needs both), the difference is an edge. `constant` is
the measured latency with 8 bits everywhere. See `lampq_rt.latency.predict`.
"""

from __future__ import annotations

import math

from lampq_rt.backends import Formats
from lampq_rt.errors import TableError
from lampq_rt.formats import INTEGER_BITS, Format
from lampq_rt.latency.predict import WIDTHS, Predictor
from lampq_rt.latency.table import COMPILED, OURS
from lampq_rt.sites import Site

FP32 = "fp32-eager"
"""The variant that a percentage refers to."""

LEAST = INTEGER_BITS[0]
"""Weights of 1 bit run as those of this width do."""


class Latency:
    """Milliseconds of one batch size; a `PairCost`. `full` is not a number where the table has no fp32 model.

    Args:
        predictor: of the model at that batch size.

    Raises:
        TableError: the table lacks what the model needs.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.constant = predictor.entry.latency_ms[OURS]
        shares = predictor.shares()
        self.edges = {
            sites: {(a, b): costs[max(a, LEAST), max(b, LEAST)] for a in (1, *WIDTHS) for b in (1, *WIDTHS)}
            for sites, costs in shares.edges.items()
        }
        self.baselines = {v: ms for v, ms in predictor.entry.latency_ms.items() if v not in COMPILED}
        self.full = self.baselines.get(FP32, math.nan)
        self._nodes = shares.nodes

    @property
    def fastest(self) -> tuple[str, float]:
        """Name and milliseconds of the fastest floating-point variant.

        Raises:
            TableError: the table was made without any.
        """
        if not self.baselines:
            raise TableError("the latency table has no floating-point latency of this model for a speedup to refer to")
        return min(self.baselines.items(), key=lambda item: item[1])

    def of(self, site: Site, formats: Formats) -> float:
        """See `Cost.of`."""
        return self._nodes[site.name][max(width(formats), LEAST)]


def width(formats: Formats) -> int:
    """The width of a site in these formats: of its weight, or of its wider operand."""
    weight: Format | None = formats.get("weight")
    return max(f.bits for f in formats.values()) if weight is None else weight.bits
