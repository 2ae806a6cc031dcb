"""What a part of the GPU benchmark is given, and how it keeps what it found when it is stopped or something fails."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

Facts = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One part.

    Attributes:
        args: what follows the part's name.
        folder: for tuning tables.
        result: file that the facts go to.
        weights: of DeiT-Tiny, or None.
        until: when it is stopped, as `time.time()` counts: by the clock of who started it, since to import torch and
            the GPU's libraries takes a cold machine many seconds.
        earlier: what the same part found, with the same sources, before it ran out of time.
    """

    args: tuple[str, ...]
    folder: Path
    result: Path
    weights: Path | None = None
    until: float = field(default_factory=lambda: time.time() + 120)
    earlier: Facts = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until it is stopped."""
        return self.until - time.time()

    def save(self, facts: Facts) -> None:
        """Keep what is known so far: a part may be stopped at any moment."""
        beside = self.result.with_suffix(".new")
        beside.write_text(json.dumps(facts))
        os.replace(beside, self.result)


def attempt(work: Callable[[], Facts]) -> Facts:
    """What `work` finds, or {"error": line} where it fails; raises where the GPU itself is lost to this process."""
    try:
        return work()
    except Exception as error:  # whatever it is, the other rows of the part are worth having
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def bench(function: Callable[[], object]) -> dict[str, float]:
    """Median and spread of a call in milliseconds, with the L2 cache cleared in between.

    The first calls compile, warm up, and record CUDA graphs; `do_bench` makes one call before it estimates how often
    to repeat.
    """
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    low, median, high = triton.testing.do_bench(function, warmup=25, rep=200, quantiles=[0.2, 0.5, 0.8])
    return {"p20": low, "median": median, "p80": high}
