"""What a choice of bits costs, in the units that budgets are given in. One file each, behind the protocol in `base`."""

from lampq_rt.calibrate.costs import bops, mean_activation_bits, mean_bits, size  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.costs.base import COSTS, TIMED, Budget, Cost, CostFactory, Edges, PairCost, edges_of, total

__all__ = ["COSTS", "TIMED", "Budget", "Cost", "CostFactory", "Edges", "PairCost", "edges_of", "total"]
