"""Linear algebra in place, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lampq_rt.calibrate import spd


def matrix(size: int) -> Tensor:
    """fp64 [size, size], positive definite."""
    x = torch.randn(size + 5, size, dtype=torch.float64)
    return x.t() @ x / size + 0.01 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 192])
def test_factor_of_the_inverse(size: int) -> None:
    a = matrix(size)
    found = spd.inverse_factor(a.clone())
    assert found.dtype == torch.float64 and torch.equal(found, found.triu())
    torch.testing.assert_close(found, torch.linalg.cholesky(torch.linalg.inv(a), upper=True))


def test_the_matrix_itself_is_used_up() -> None:
    """No second one is made."""
    a = matrix(8)
    found = spd.inverse_factor(a)
    assert found.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("work", [spd.inverse_factor, lambda a: spd.ridge(a, a, 0.0)])
def test_what_is_not_positive_definite_is_refused(work: object) -> None:
    with pytest.raises(ArithmeticError, match="not positive definite"):
        work(-matrix(4))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ridge_regression_solves_its_normal_equations(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=source, dtype=dtype), torch.randn(50, 3, generator=source, dtype=dtype)
    moment, cross = x.T @ x, y.T @ x
    before = moment.clone(), cross.clone()
    found = spd.ridge(moment, cross, 0.1)
    damping = 0.1 * moment.diagonal().mean() * torch.eye(6, dtype=dtype)
    torch.testing.assert_close(found.to(dtype) @ (moment + damping), cross, rtol=1e-4, atol=1e-4)
    assert torch.equal(moment, before[0]) and torch.equal(cross, before[1]) and found.dtype == torch.float32


@pytest.mark.parametrize(("outputs", "features"), [(1025, 1100), (1000, 192)])
def test_a_large_regression_is_in_fp64_in_parts(outputs: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes is what all at once would give, to the bit."""
    source = torch.Generator().manual_seed(0)
    moment, cross = matrix(features).float(), torch.randn(outputs, features, generator=source)
    sizes: list[int] = []

    def noted(factor: Tensor, b: Tensor) -> Tensor:
        sizes.append(b.shape[1])
        return solved(factor, b)

    solved = spd._solved
    monkeypatch.setattr(spd, "_solved", noted)
    found = spd.ridge(moment, cross, 0.1)
    assert sizes == ([256, 256, 256, 256, 1] if features > 1000 else [outputs])
    damped = moment.double()
    damped.diagonal().add_(0.1 * moment.diagonal().mean().double())
    assert torch.equal(found, solved(spd._factor(damped), cross.double().t()).t().float())
