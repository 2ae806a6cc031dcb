"""QDrop (2203.05740): in training, elements of a linear's input are left in floating point at random.

Rounding then has to suit inputs with less noise as well, a flatter place. An element is left with probability `drop`,
0.5 in the paper; what leaves the training is always quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Drop:
    """Leaves elements in floating point, inside `at` only.

    Args:
        probability: that an element is left; 0 leaves none.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self._draws: torch.Generator | None = None

    @contextmanager
    def at(self, seed: int, device: torch.device) -> Iterator[None]:
        """Leave elements while the block runs; the same seed, the same elements."""
        if self.probability:
            self._draws = torch.Generator(device).manual_seed(seed)
        try:
            yield
        finally:
            self._draws = None

    def __call__(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """x_hat, with some elements of x; both of one shape and dtype."""
        if self._draws is None:
            return x_hat
        left = torch.rand(x.shape, generator=self._draws, device=x.device) < self.probability
        return torch.where(left, x, x_hat)
