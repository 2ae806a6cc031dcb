"""What a calibration is given beside the model, its images and their labels: the same for every recipe and budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lampq_rt.calibrate.distributed import SINGLE, Shard
from lampq_rt.calibrate.prepare import NO_MORE, Material
from lampq_rt.calibrate.progress import Report
from lampq_rt.latency.table import LatencyTable


def silent(stage: str, done: int, total: int) -> None:
    """A `Report` that tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and with what one model is measured; `make_plan` says what callers may ask for.

    Attributes:
        target: "any", "cpu" or "cuda": whose formats may be used.
        seed: of everything that is sampled.
        device: where to measure; None is the CPU.
        model_name: what plans call the model; None: timm's name of it.
        images_digest: what plans record of the images; None: the SHA-256 of their values.
        latency_table: what budgets of latency are reckoned with, or its file; None: the present machine's.
        report: told of progress.
        shard: the processes that calibrate together.
        material: what recipes that train have beside.
    """

    target: str = "any"
    seed: int = 0
    device: str | torch.device | None = None
    model_name: str | None = None
    images_digest: str | None = None
    latency_table: LatencyTable | Path | None = None
    report: Report = silent
    shard: Shard = SINGLE
    material: Material = NO_MORE
