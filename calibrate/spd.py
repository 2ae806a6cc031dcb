"""Symmetric positive definite matrices in fp64, [K, K]: among the largest things in a calibration.

On a CPU LAPACK works in the matrix that it is given; torch.linalg holds two or three of them at a time. K of fc2 in
ViT-Large is 4,096: 134 MB each, a ninth of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.linalg import lapack
from torch import Tensor


def solve(a: Tensor, b: Tensor) -> Tensor:
    """a^-1 b, fp64 [K, N].

    Args:
        a: fp64 [K, K], contiguous, positive definite; used up.
        b: fp64 [K, N]; used up where its columns are contiguous.

    Raises:
        ArithmeticError: `a` is not positive definite.
    """
    if a.device.type != "cpu":
        return torch.cholesky_solve(b, torch.linalg.cholesky(a))
    factor = _done(*lapack.dpotrf(a.numpy().T, lower=0, clean=0, overwrite_a=1))
    return torch.from_numpy(_done(*lapack.dpotrs(factor, b.numpy(), lower=0, overwrite_b=1)))


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
    return solve(damped, cross.to(torch.float64, copy=True).t()).t().float()


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
    upper = _done(*lapack.dpotrf(a.numpy().T, lower=0, clean=0, overwrite_a=1))
    inverse = _done(*lapack.dpotri(upper, lower=0, overwrite_c=1))
    upper = _done(*lapack.dpotrf(inverse, lower=0, clean=0, overwrite_a=1))
    return torch.from_numpy(upper.T).tril_().t()


def _done(found: Any, info: int) -> Any:
    """What LAPACK found, if it did."""
    if info:
        raise ArithmeticError(f"not positive definite: LAPACK's info is {info}")
    return found
