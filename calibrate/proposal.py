"""An allocator's answer to one penalty, as plans are compared by."""

from __future__ import annotations

from dataclasses import dataclass

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
        divergence: on the calibration images (`judge.Answers`), where several proposals were compared.
    """

    penalty: str | None
    score: Score | None
    problem: Problem
    allocation: Allocation
    divergence: float | None = None
