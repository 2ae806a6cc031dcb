"""Rounding of a weight that knows what its errors do (GPTQ, Frantar et al., 2210.17323; OBQ, 2208.11580).

Column after column is rounded, and what that costs is made good by the columns still free: with H = X^T X of the
layer's inputs, the least of ||(W_hat - W) X^T||^2 that rounding the next column leaves possible. Columns of large
diagonal come first (the "activation order").
"""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.calibrate import spd
from lampq_rt.calibrate.search import weight_steps
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.quantizers.levels import nearest

BLOCK = 64
"""Columns whose updates are gathered before the rest of the weight is touched."""

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it."""


def weighted_moment(rows: Tensor, worth: Tensor) -> Tensor:
    """fp32 [K, K]: second moment of rows [R, K] about their mean, the bias's work; a row counts `worth` [R]."""
    share = worth / worth.sum()
    centred = rows - share @ rows
    del rows  # where nobody else holds them: there are two of their size already
    return centred.t() @ (centred * share[:, None])


def rounded(weight: Tensor, fmt: Format, hessian: Tensor, damping: float = DAMPING) -> dict[str, Tensor]:
    """Steps, levels where the format has them, and codes of a weight fp32 [N, K], by key of a plan; see `gptq`."""
    steps = weight_steps(weight, fmt)
    codes = gptq(weight, steps["weight.scale"], hessian, fmt.bits, steps.get("weight.levels"), damping)
    return {**steps, "weight.codes": codes}


@torch.no_grad()
def gptq(
    weight: Tensor,
    scale: Tensor,
    hessian: Tensor,
    bits: int,
    levels: Tensor | None = None,
    damping: float = DAMPING,
) -> Tensor:
    """int8 codes [N, K] of `weight`.

    Args:
        weight: fp32 [N, K].
        scale: fp32 [N], steps.
        hessian: [K, K], second moment of the inputs, positive semidefinite; channels of no energy are rounded to
            nearest.
        bits: width of a code.
        levels: int8 [2^bits], rising, where codes name unequal levels.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    low, high = reference.code_range(bits, weight=True)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian, order, damping)
    work = weight.t()[order].float()  # [K, N], a copy
    work /= scale  # in units of the step
    codes = torch.empty(work.shape, dtype=torch.int8, device=work.device)
    values = None if levels is None else levels.to(weight.device, torch.float32)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        block, errors = work[start:stop], torch.empty_like(work[start:stop])
        rows = upper[start:stop, start:].t().float()  # of all rows in fp32 there would be half as much again
        factor, later = rows[: stop - start].t(), rows[stop - start :]
        for i in range(stop - start):
            if values is None:
                codes[start + i] = rounded = block[i].round().clamp_(low, high)
            else:
                places = nearest(block[i], values)
                codes[start + i], rounded = places + low, values[places]
            errors[i] = (block[i] - rounded) / factor[i, i]
            block[i + 1 :] -= torch.outer(factor[i, i + 1 :], errors[i])
        work[stop:] -= later @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """fp64 [K, K], upper triangular: Cholesky's factor of the inverse of the damped `hessian` in that order."""
    h = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for some in range(0, len(h), BLOCK):
        h[some : some + BLOCK] = hessian[order[some : some + BLOCK, None], order]
    h.diagonal().add_((damping * h.diagonal().mean()).clamp_min(1e-12))
    return spd.inverse_factor(h)
