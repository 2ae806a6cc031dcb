"""Every element of a block's output counts alike: BRECQ (2102.05426) with an identity for its Fisher matrix.

loss = ||y_hat - y||^2 / ||y - mean(y)||^2
"""

from __future__ import annotations

from lampq_rt.calibrate.objectives.base import OBJECTIVES, BlockError, Study, relative_error


class Mse:
    """`Objective` without statistics."""

    orders: tuple[str, ...] = ("together", "blocks")
    why = ""

    def measure(self, study: Study) -> BlockError:
        """See `Objective.measure`."""
        return lambda block, y_hat, y: relative_error(y_hat, y)


OBJECTIVES.register("mse")(Mse())
