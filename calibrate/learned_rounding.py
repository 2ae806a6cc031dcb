"""How the rounding of weights learns: one choice an entry of `ROUNDINGS`. The codes of a plan come out either way.

`straight-through`: the weight itself learns, and its code changes when it crosses the middle between two codes.

`adaround` (Nagel et al., 2004.10568): whether a weight is rounded down or up learns, and nothing else of it:

    code = floor(w) + h(V),   h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)   (eq. 23)

between the neighbours of the weight that training starts with (of unequal levels, h counts their distance). V starts
where h(V) is the weight's own fraction. A penalty sum(1 - |2 h - 1|^beta) (eq. 24), beta falling from 20 to 2 behind a
warm-up without it, pushes every h to 0 or 1; at the end each is what it is nearer to. Steps of weights stay as they
are: floors are in units of them.

`kept`: codes stay what compensation made them, and steps, norms and biases learn around them: few numbers, which a few
hundred images suffice for, and no gradient of a weight to form (NormTweaking, 2309.02784, trains norms alone).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from lampq_rt.calibrate.straight_through import LearningLinear
from lampq_rt.quantizers.levels import nearest
from lampq_rt.registry import Registry

LOW, HIGH = -0.1, 1.1
"""Ends of the stretched sigmoid (2004.10568, eq. 23)."""

BETAS = (20.0, 2.0)
"""First and last exponent of the penalty."""

QUIET = 0.2
"""Share of the steps before the penalty begins."""

WEIGHT = 0.01
"""Of the penalty, beside an error that starts at 1."""


class LearnedRounding(Protocol):
    """One way in which the codes of linears learn.

    Attributes:
        rate: name of the field of `Schedule` that says how fast.
    """

    rate: str

    def begin(self, linears: Iterable[LearningLinear]) -> None:
        """Prepare linears whose training begins."""
        ...

    def weights(self, linear: LearningLinear) -> list[nn.Parameter]:
        """What learns of its codes."""
        ...

    def steps(self, linear: LearningLinear) -> list[nn.Parameter]:
        """What learns of its weight's steps."""
        ...

    def penalty(self, linears: Iterable[LearningLinear], done: float) -> Tensor | None:
        """What is added to the loss, beside an error that starts at 1; `done` is the share of the steps, 0..1."""
        ...

    def finish(self, linears: Iterable[LearningLinear]) -> None:
        """Leave every code at what `LearningLinear.learned` rounds it to."""
        ...


ROUNDINGS: Registry[LearnedRounding] = Registry("learned rounding")


class StraightThrough:
    """See the top of the file."""

    rate = "codes"

    def begin(self, linears: Iterable[LearningLinear]) -> None:
        """Nothing is to prepare."""

    def weights(self, linear: LearningLinear) -> list[nn.Parameter]:
        """The codes."""
        return [linear.codes]

    def steps(self, linear: LearningLinear) -> list[nn.Parameter]:
        """Their steps."""
        return [linear.log_weight_step]

    def penalty(self, linears: Iterable[LearningLinear], done: float) -> Tensor | None:
        """None."""
        return None

    @torch.no_grad()
    def finish(self, linears: Iterable[LearningLinear]) -> None:
        """Bring every weight to the middle of its code, from where a later unit has as far to either neighbour."""
        for linear in linears:
            linear.codes.copy_(linear.values[nearest(linear.codes, linear.values)])


class SoftCodes(nn.Module):
    """Codes between two neighbours.

    Args:
        codes: fp32 [N, K], in units of the step, not rounded.
        values: fp32 [L], what codes may be, rising.

    Attributes:
        v: fp32 [N, K].
    """

    def __init__(self, codes: Tensor, values: Tensor) -> None:
        super().__init__()
        below = (torch.bucketize(codes, values, right=True) - 1).clamp(0, len(values) - 2)
        floor, gap = values[below], values.diff()[below]
        self.register_buffer("floor", floor, persistent=False)
        self.register_buffer("gap", gap, persistent=False)
        self.floor: Tensor
        self.gap: Tensor
        share = (((codes - floor) / gap).clamp(0.0, 1.0) - LOW) / (HIGH - LOW)
        self.v = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """h(V), fp32 [N, K] in 0..1."""
        return (self.v.sigmoid() * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def forward(self) -> Tensor:
        """Codes, fp32 [N, K], with a gradient of V."""
        return self.floor + self.gap * self.share()

    def hard(self) -> Tensor:
        """Codes, fp32 [N, K], each the neighbour that it is nearer to."""
        return torch.where(self.share() >= 0.5, self.floor + self.gap, self.floor)


class AdaRound:
    """See the top of the file."""

    rate = "soft"

    def begin(self, linears: Iterable[LearningLinear]) -> None:
        """Give each its soft codes."""
        for linear in linears:
            linear.soft = SoftCodes(linear.codes.detach(), linear.values)
            linear.codes.requires_grad_(False)
            linear.log_weight_step.requires_grad_(False)

    def weights(self, linear: LearningLinear) -> list[nn.Parameter]:
        """V."""
        return [self._soft(linear).v]

    def steps(self, linear: LearningLinear) -> list[nn.Parameter]:
        """None."""
        return []

    def penalty(self, linears: Iterable[LearningLinear], done: float) -> Tensor | None:
        """WEIGHT * sum(1 - |2 h - 1|^beta) over all weights; None while it is quiet."""
        if done < QUIET:
            return None
        beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1.0 - (done - QUIET) / (1.0 - QUIET))
        parts = [(1.0 - (2.0 * self._soft(linear).share() - 1.0).abs().pow(beta)).sum() for linear in linears]
        return WEIGHT * torch.stack(parts).sum() if parts else None

    @torch.no_grad()
    def finish(self, linears: Iterable[LearningLinear]) -> None:
        """Make every code hard."""
        for linear in linears:
            linear.codes.copy_(self._soft(linear).hard())
            linear.soft = None

    @staticmethod
    def _soft(linear: LearningLinear) -> SoftCodes:
        assert isinstance(linear.soft, SoftCodes)
        return linear.soft


class Kept:
    """See the top of the file."""

    rate = "codes"

    def begin(self, linears: Iterable[LearningLinear]) -> None:
        """Make each weight once for all steps."""
        for linear in linears:
            linear.keep()

    def weights(self, linear: LearningLinear) -> list[nn.Parameter]:
        """None."""
        return []

    def steps(self, linear: LearningLinear) -> list[nn.Parameter]:
        """The weight's steps."""
        return [linear.log_weight_step]

    def penalty(self, linears: Iterable[LearningLinear], done: float) -> Tensor | None:
        """None."""
        return None

    def finish(self, linears: Iterable[LearningLinear]) -> None:
        """Nothing is left to do."""


ROUNDINGS.register("kept")(Kept())
ROUNDINGS.register("straight-through")(StraightThrough())
ROUNDINGS.register("adaround")(AdaRound())
