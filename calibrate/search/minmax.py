"""The whole observed range: nothing is clipped, outliers make the step coarse."""

from __future__ import annotations

from torch import Tensor

from lampq_rt.calibrate.observe import LinearObservation, PVObservation, QKObservation
from lampq_rt.calibrate.search.base import (
    SEARCHES,
    LinearSolver,
    PVSolver,
    QKSolver,
    Steps,
    range_steps,
    symmetric_scale,
)
from lampq_rt.formats import Format


class MinMax:
    """Range from the exact extremes of all calibration images."""

    def linear(self, seen: LinearObservation, weight: Tensor) -> LinearSolver:
        """See `RangeSearch.linear`."""
        return lambda fmt, weight_hat: range_steps(seen.low, seen.high, fmt)

    def qk(self, seen: QKObservation) -> QKSolver:
        """See `RangeSearch.qk`."""
        return lambda fmt: (_head_steps(seen.q_max, fmt), _head_steps(seen.k_max, fmt))

    def pv(self, seen: PVObservation) -> PVSolver:
        """See `RangeSearch.pv`."""
        return lambda fmt: _head_steps(seen.v_max, fmt)


def _head_steps(max_abs: Tensor, fmt: Format) -> Steps:
    return Steps(symmetric_scale(max_abs.double(), fmt.bits))


SEARCHES.register("minmax")(MinMax())
