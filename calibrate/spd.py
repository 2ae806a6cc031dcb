"""Symmetric positive definite matrices in fp64, [K, K]: among the largest things in a calibration.

On a CPU LAPACK works in the matrix that it is given; torch.linalg holds two or three of them at a time. K of fc2 in
ViT-Large is 4,096: 134 MB each, a ninth of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.linalg import lapack
from torch import Tensor

ROWS = 256
"""Rows of a large `cross` that `ridge` solves for at once on a CPU: more would lie in memory in fp64 for nothing.
LAPACK gives the bits that it gives for all rows: tried for K of 768 to 5,120. (K = 588 has others, and is small.)"""

LARGE = 1 << 20
"""Elements of a large `cross`: one such takes 8 MB in fp64. Of smaller ones no part is worth a call."""


def ridge(moment: Tensor, cross: Tensor, share: float) -> Tensor:
    """Ridge regression: fp32 [N, K], cross (moment + lambda)^-1.

    Args:
        moment: cov(x, x), [K, K].
        cross: cov(y, x), [N, K].
        share: lambda, in times the mean of the moment's diagonal.

    Raises:
        ArithmeticError: `moment` is not positive semi-definite, or not finite.
    """
    damped = moment.to(torch.float64, copy=True)
    damped.diagonal().add_((share * moment.diagonal().mean().double()).clamp_min(1e-12))
    factor, found = _factor(damped), torch.empty_like(cross, dtype=torch.float32, memory_format=torch.contiguous_format)
    size = ROWS if cross.numel() > LARGE and cross.device.type == "cpu" else len(cross)
    for rows, out in zip(cross.split(size), found.split(size), strict=True):
        out.copy_(_solved(factor, rows.to(torch.float64, copy=True).t()).t())
    return found


def inverse_factor(a: Tensor) -> Tensor:
    """fp64 [K, K], upper triangular U with U^T U = a^-1, in the memory of `a`.

    Args:
        a: fp64 [K, K], contiguous, positive definite; used up.

    Raises:
        ArithmeticError: `a` is not positive definite.
    """
    if a.device.type != "cpu":
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(a))
        return torch.linalg.cholesky(inverse, upper=True)
    inverse = _done(*lapack.dpotri(_factor(a).numpy().T, lower=0, overwrite_c=1))
    upper = _done(*lapack.dpotrf(inverse, lower=0, clean=0, overwrite_a=1))
    return torch.from_numpy(upper.T).tril_().t()


def _factor(a: Tensor) -> Tensor:
    """fp64 [K, K], lower triangle L with L L^T = a, in the memory of `a` on a CPU; above it lies something else.

    LAPACK, which goes by columns, is told of the upper triangle of the same memory.
    """
    if a.device.type != "cpu":
        return torch.linalg.cholesky(a)
    return torch.from_numpy(_done(*lapack.dpotrf(a.numpy().T, lower=0, clean=0, overwrite_a=1)).T)


def _solved(factor: Tensor, b: Tensor) -> Tensor:
    """a^-1 b, fp64 [K, N], with the `_factor` of a; `b` is used up where its columns are contiguous."""
    if factor.device.type != "cpu":
        return torch.cholesky_solve(b, factor)
    return torch.from_numpy(_done(*lapack.dpotrs(factor.numpy().T, b.numpy(), lower=0, overwrite_b=1)))


def _done(found: Any, info: int) -> Any:
    """What LAPACK found, if it did."""
    if info:
        raise ArithmeticError(f"not positive definite: LAPACK's info is {info}")
    return found
