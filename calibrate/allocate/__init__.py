"""Choice of bits under budgets. One file each, behind the protocol in `base`."""

from lampq_rt.calibrate.allocate import milp, uniform  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.allocate.base import ALLOCATORS, Allocation, Allocator, Problem

__all__ = ["ALLOCATORS", "Allocation", "Allocator", "Problem"]
