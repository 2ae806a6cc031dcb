"""The best of a few percentiles by squared error of the operand itself, as RepQ-ViT (arXiv 2212.08254) calibrates.

Percentile p of a range with zero-point keeps the values between the (1 - p)- and the p-quantile; of a symmetric one,
those whose absolute value is below the p-quantile. p = 1 is the whole range.
"""

from __future__ import annotations

import torch
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
from lampq_rt.quantizers import QUANTIZERS

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)


class Percentile:
    """Least squared error over `PERCENTILES`."""

    def linear(self, seen: LinearObservation, weight: Tensor) -> LinearSolver:
        """See `RangeSearch.linear`."""
        ordered = seen.rows.flatten().sort().values
        ranges = [(quantile(ordered, 1.0 - p), quantile(ordered, p)) for p in PERCENTILES[:-1]]
        ranges.append((seen.low, seen.high))

        def solve(fmt: Format, weight_hat: Tensor) -> Steps:
            choices = [range_steps(low, high, fmt) for low, high in ranges]
            errors = [_squared_error(seen.rows, steps, fmt) for steps in choices]
            return choices[errors.index(min(errors))]

        return solve

    def qk(self, seen: QKObservation) -> QKSolver:
        """See `RangeSearch.qk`."""
        q, k = (x.transpose(0, 1).flatten(1) for x in (seen.q, seen.k))
        solve_q, solve_k = _head_solver(q, seen.q_max), _head_solver(k, seen.k_max)
        return lambda fmt: (solve_q(fmt), solve_k(fmt))

    def pv(self, seen: PVObservation) -> PVSolver:
        """See `RangeSearch.pv`."""
        return _head_solver(seen.v.flatten(1), seen.v_max)


def quantile(ordered: Tensor, p: float) -> float:
    """The value at rank p of sorted values, interpolated; `torch.quantile` refuses more than 16 million."""
    rank = min(max(p, 0.0), 1.0) * (ordered.numel() - 1)
    below = int(rank)
    low, high = (float(v) for v in ordered[[below, min(below + 1, ordered.numel() - 1)]])
    return low + (high - low) * (rank - below)


def _squared_error(x: Tensor, steps: Steps, fmt: Format) -> float:
    scale = steps.scale.to(x.device)
    zero_point = None if steps.zero_point is None else steps.zero_point.to(x.device)
    x_hat = QUANTIZERS.get(fmt.scheme).fake_quantize(x, scale, zero_point, fmt.bits)
    return float(x_hat.sub_(x).double().square_().sum())


def _head_solver(x: Tensor, max_abs: Tensor) -> PVSolver:
    """Of values [H, n] per head."""
    ordered = x.abs().sort(-1).values
    quantiles = [[quantile(head, p) for p in PERCENTILES[:-1]] for head in ordered]
    tops = torch.tensor(quantiles, dtype=torch.float64, device=x.device)
    limits = torch.cat((tops, max_abs.double()[:, None]), 1)  # [H, percentiles]

    def solve(fmt: Format) -> Steps:
        quantizer = QUANTIZERS.get(fmt.scheme)
        scales = symmetric_scale(limits, fmt.bits)
        errors = [
            quantizer.fake_quantize(x, s[:, None], None, fmt.bits).sub_(x).double().square_().sum(-1)
            for s in scales.unbind(1)
        ]
        best = torch.stack(errors, 1).argmin(1, keepdim=True)
        return Steps(scales.gather(1, best).squeeze(1))

    return solve


SEARCHES.register("percentile")(Percentile())
