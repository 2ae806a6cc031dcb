"""Schedules of training: what is trained, how long and how fast. Data only; `reconstruct` carries them out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lampq_rt.calibrate.learned_rounding import ROUNDINGS
from lampq_rt.calibrate.objectives import OBJECTIVES
from lampq_rt.calibrate.orders import ORDERS, Rates

__all__ = ["FINISHING", "Rates", "Schedule"]

FINISHING = Rates(codes=0.0025, factors=5e-4, rest=2.5e-4, soft=0.025)
"""Half of the default rates: what has been trained block after block is nearly right."""


@dataclass(frozen=True)
class Schedule:
    """What is trained, how long and how fast.

    Attributes:
        steps: of Adam; 0 leaves the plan as it is. With order "blocks", of each block.
        batch: images a step.
        codes: learning rate of weights, in codes a step.
        factors: of logarithms of steps.
        rest: of norms and biases.
        blocks: weight of the blocks' errors.
        answers: weight of the answers' divergence.
        edge: how far from its code a weight may start: it is that of the floating-point model, moved so near that it
            still rounds to the code of the plan.
        objective: name of `objectives`: what the error of a block's output counts.
        order: name of `orders`: "together" or "blocks".
        rounding: name of `learned_rounding`: "straight-through", "adaround" or "kept".
        soft: learning rate of AdaRound's V.
        drop: probability that an element of a linear's input is left in floating point (QDrop); 0: never.
        statistics: images that an objective measures its statistics on, before training.
        finish: steps, behind order "blocks", of all together towards the answers alone (`orders.blocks`).
        finish_rates: their learning rates.
        full_rates: divergence of the plan's answers before training, in nats, from which on the rates are as given; of
            a plan that diverges less all are lower, by the square root of the ratio, down to half (`reconstruct`). 0:
            they are as given.

    Raises:
        UnknownNameError: no such objective, order or rounding.
        ValueError: the objective makes no sense in this order, or a number is out of range.
    """

    steps: int = 0
    batch: int = 16
    codes: float = 0.005
    factors: float = 1e-3
    rest: float = 5e-4
    blocks: float = 10.0
    answers: float = 0.3
    edge: float = 0.45
    objective: str = "mse"
    order: str = "together"
    rounding: str = "straight-through"
    soft: float = 0.05
    drop: float = 0.0
    statistics: int = 32
    finish: int = 0
    finish_rates: Rates = FINISHING
    full_rates: float = 0.0

    def __post_init__(self) -> None:
        objective = OBJECTIVES.get(self.objective)
        ORDERS.get(self.order)
        ROUNDINGS.get(self.rounding)
        if self.order not in objective.orders:
            allowed = ", ".join(objective.orders)
            raise ValueError(f"objective {self.objective!r}, order {self.order!r}: {objective.why}; allowed: {allowed}")
        if self.blocks < 0.0 or self.answers < 0.0 or self.blocks + self.answers == 0.0:
            raise ValueError(f"blocks {self.blocks}, answers {self.answers}; allowed: 0 or more, not both 0")
        if self.order == "blocks" and not self.blocks:
            raise ValueError("blocks 0.0 in order 'blocks': a block would have nothing to learn; allowed: more than 0")
        if self.finish < 0 or (self.finish and (self.order != "blocks" or not self.steps)):
            raise ValueError(
                f"finish {self.finish} behind {self.steps} steps in order {self.order!r}; allowed: 0, or more behind "
                "steps in order 'blocks'"
            )
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"drop {self.drop}; allowed: 0 or more, less than 1")
        for place, rates in (("", self), ("finish_rates.", self.finish_rates)):
            for name in (field.name for field in fields(Rates)):
                rate = getattr(rates, name)
                if not 0.0 <= rate < math.inf:  # torch would say so, too, but of the finish only behind all blocks
                    raise ValueError(f"learning rate {place}{name} = {rate}; allowed: 0 or more, finite")
        if not 0.0 <= self.full_rates < math.inf:
            raise ValueError(f"full rates from a divergence of {self.full_rates} on; allowed: 0 or more, finite")
        if self.statistics < 1:
            raise ValueError(f"statistics on {self.statistics} images; allowed: 1 or more")

    def facts(self) -> dict[str, Any]:
        """What tells two schedules apart: choices that came later are named only where they are not the default."""
        chosen = {field.name: field.default for field in fields(self)}
        later = ("objective", "order", "rounding", "soft", "drop", "statistics", "finish", "full_rates")
        silent = {key for key in later if getattr(self, key) == chosen[key]}
        if not self.finish:
            silent.add("finish_rates")
        return {key: value for key, value in asdict(self).items() if key not in silent}
