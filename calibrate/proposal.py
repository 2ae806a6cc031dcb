"""An allocator's answer to one penalty, as plans are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lampq_rt.backends import Formats
from lampq_rt.calibrate.allocate import Allocation, Problem
from lampq_rt.calibrate.metrics import Score


@dataclass
class Proposal:
    """An allocator's answer to one penalty.

    Attributes:
        penalty: its name, or None where the allocator looks at none.
        score: what the penalty said.
        problem: what was solved.
        allocation: the answer.
        formats: of all sites at that answer, in order of execution.
        free: True where weights, inputs and attention matmuls had variables of their own.
        divergence: on the calibration images (`judge.Answers`), where several proposals were compared.
    """

    penalty: str | None
    score: Score | None
    problem: Problem
    allocation: Allocation
    formats: Mapping[str, Formats]
    free: bool = False
    divergence: float | None = None

    def facts(self) -> dict[str, Any]:
        """JSON-able, for the plan's provenance."""
        facts = {"penalty": self.penalty, "objective": self.allocation.objective, "divergence": self.divergence}
        return {**facts, "widths": "free"} if self.free else facts


def distinct(proposals: list[Proposal], best: Proposal) -> list[Proposal]:
    """The best proposal and all of other bits: which gains most from compensation is seen only after it."""
    found = [best]
    for proposal in proposals:
        if all(proposal.formats != other.formats for other in found):
            found.append(proposal)
    return found
