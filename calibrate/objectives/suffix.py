"""Errors count by what the rest of the floating-point model makes of them: block loss of GLF-Q (2026).

    loss = ||f(y_hat) - f(y)||^2 / its first value + 2 ||y_hat - y||^2 / its first value

where f is the frozen floating-point suffix, from behind the block to the input of the head; brought to the size of
`mse` at the first step. Nothing is measured before training, but every step runs, and differentiates, the suffix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study

LOCAL = 2.0
"""Weight of the error at the block itself."""


class Suffix:
    """`Objective` without statistics."""

    orders: tuple[str, ...] = ("blocks",)
    why = "it runs all that follows behind every block"

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`."""
        exact = study.exact

        def feature(block: int, y: Tensor) -> Tensor:
            return stream.penultimate(exact, stream.through(exact, y, block + 1))

        def error(block: int, y_hat: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = feature(block, y)
            terms = {
                "feature": (1.0, F.mse_loss(feature(block, y_hat), wanted)),
                "local": (LOCAL, F.mse_loss(y_hat, y)),
            }
            return study.first.sized(block, terms, y_hat, y)

        return error


OBJECTIVES.register("suffix")(Suffix())
