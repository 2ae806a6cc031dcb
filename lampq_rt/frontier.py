"""Accuracy against bytes and latency over a range of budgets: points, what is kept of them, and who wins.

A sweep is a folder. `sweep.json` says of what (model, weights, images), `points.jsonl` has a line for every finished
point, `plans/` the plans and the states of trainings that were stopped, `kl/` the divergence of every evaluation image,
from which paired errors are taken. A sweep that was stopped goes on where it was; one of other weights or images is
refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lampq_rt import files
from lampq_rt.errors import DataError, PlanError
from lampq_rt.plan import Plan

SWEEP, POINTS, PLANS, ANSWERS = "sweep.json", "points.jsonl", "plans", "kl"
FILE_LIMIT = 256 << 20

LATER = ("training images",)
"""What a sweep may be told after it was begun: nothing trains before a recipe that does is asked for."""

NOISE = 2.0
"""Standard errors of a paired difference within which two plans count as equal."""

TIE = 2e-3
"""Relative difference in bytes or milliseconds that counts as none: a checkpoint says in JSON how its bits were chosen,
which takes more bytes for some recipes than for others."""

Axis = Literal["disk_bytes", "latency_ms"]
Quality = Literal["kl", "agreement", "top1"]
QUALITIES: tuple[Quality, ...] = ("kl", "agreement", "top1")


@dataclass(frozen=True)
class Point:
    """One plan of the sweep.

    Attributes:
        recipe: name of the recipe.
        asked_bits: the budget, mean bits.
        mean_bits: what the plan has.
        disk_bytes: of its checkpoint.
        weight_bytes: of its compiled model's tensors in memory.
        latency_ms: median of one batch; None where it is not known.
        images: number of evaluation images.
        top1, fp32_top1: percent; None without labels.
        agreement: percent of images with the original's top-1.
        kl: KL(original || plan), nats, mean over images.
        kl_error: standard error of `kl`.
        divergence: on the calibration images, as the calibrator compared plans; None where it did not.
        seconds: taken by the plan, without evaluation.
        plan: the plan's folder, relative to the sweep's.
    """

    recipe: str
    asked_bits: float
    mean_bits: float
    disk_bytes: int
    weight_bytes: int
    latency_ms: float | None
    images: int
    top1: float | None
    fp32_top1: float | None
    agreement: float
    kl: float
    kl_error: float
    divergence: float | None
    seconds: float
    plan: str

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.recipe}-{self.asked_bits:g}"


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot become a sweep and is none, or that cannot be written; it is left as it is.

    Raises:
        DataError: names the obstacle.
    """
    if (folder / SWEEP).is_file():
        files.check_place(folder / SWEEP, what="sweep", error=DataError)
    else:
        files.check_place(folder, what="sweep", error=DataError, names=())


class Sweep:
    """The folder of a sweep. Nothing is written before `make`, so that a start that fails leaves nothing behind.

    Args:
        folder: of a sweep, empty, or not there; its parent must be.
        setting: JSON-able facts that all points share.

    Raises:
        DataError: the folder holds something else, or a sweep of another setting; the message names the difference.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        check_folder(folder)
        self.folder, self.setting = folder, dict(setting)
        self.points: dict[tuple[str, float], Point] = {}
        if (folder / SWEEP).is_file():
            self.setting = self._checked(setting)
            self.points = {(p.recipe, p.asked_bits): p for p in self._read()}

    def make(self) -> None:
        """Make the folder where it is not there, and say in it what it is a sweep of.

        Raises:
            DataError: it could not be made.
        """
        text = json.dumps(self.setting, indent=1, allow_nan=False) + "\n"
        try:
            self.folder.mkdir(exist_ok=True)
            files.write_file(self.folder / SWEEP, text.encode(), what="sweep", error=DataError)
            for name in (PLANS, ANSWERS):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as cause:
            raise DataError(f"cannot use folder {files.shown(self.folder)}: {files.reason(cause)}") from None

    def add(self, point: Point, kl: Tensor | None = None) -> None:
        """Keep a finished point, or a better known one; `kl`: fp64 [images] of its evaluation images, where new.

        Raises:
            DataError: it could not be written.
        """
        if kl is not None:
            data = safetensors.torch.save({"kl": kl.double().contiguous()})
            files.write_file(self._answers(point), data, what="answers", error=DataError)
        self.points[point.recipe, point.asked_bits] = point
        lines = "".join(json.dumps(asdict(p), allow_nan=False) + "\n" for p in self.points.values())
        files.write_file(self.folder / POINTS, lines.encode(), what="points", error=DataError)

    def save_plan(self, plan: Plan, recipe: str, bits: float) -> None:
        """Keep the plan of a point that is still to be evaluated; the state of its training has served.

        Raises:
            PlanError: it could not be written.
        """
        plan.save(self._plan(recipe, bits))
        self.training(recipe, bits).unlink(missing_ok=True)

    def training(self, recipe: str, bits: float) -> Path:
        """Where the state of that point's training is kept: its own, so that other points do not get in its way."""
        return self.folder / PLANS / f"{recipe}-{bits:g}.training"

    def saved_plan(self, recipe: str, bits: float, digest: str) -> Plan | None:
        """The plan that a stopped sweep left, if it is whole and was made for these weights."""
        try:
            plan = Plan.load(self._plan(recipe, bits))
        except PlanError:
            return None
        return plan if plan.weights_digest == digest else None

    def kl(self, point: Point) -> Tensor:
        """fp64 [images]: the divergence of every evaluation image.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = self._answers(point)
        data = files.read_file(path, what="answers", error=DataError, limit=FILE_LIMIT)
        try:
            return safetensors.torch.load(data)["kl"]
        except (SafetensorError, KeyError, ValueError) as cause:
            raise DataError(f"{path}: damaged ({files.reason(cause)}); remove its line from {POINTS}") from None

    def _plan(self, recipe: str, bits: float) -> Path:
        return self.folder / PLANS / f"{recipe}-{bits:g}.plan"

    def _answers(self, point: Point) -> Path:
        return self.folder / ANSWERS / f"{point.name}.safetensors"

    def _checked(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """The setting of the sweep on disk, with what it had not been told, if it is this one."""
        path = self.folder / SWEEP
        raw = files.read_file(path, what="sweep", error=DataError, limit=FILE_LIMIT)
        found = files.parse_json(raw, where=str(path), error=DataError)
        found = found if isinstance(found, dict) else {}
        for key, wanted in json.loads(json.dumps(dict(setting))).items():
            came = found.get(key)
            if came != wanted and not (key in LATER and key not in found):
                raise DataError(
                    f"{self.folder} holds a sweep with {key} = {came!r:.60}, not {wanted!r:.60}; name a new folder"
                )
        return {**found, **setting}

    def _read(self) -> Iterator[Point]:
        path = self.folder / POINTS
        if not path.is_file():
            return
        raw = files.read_file(path, what="points", error=DataError, limit=FILE_LIMIT)
        for number, line in enumerate(raw.decode(errors="replace").splitlines(), 1):
            row = files.parse_json(line, where=f"{path}, line {number}", error=DataError)
            if not isinstance(row, dict) or set(row) != {f.name for f in fields(Point)}:
                raise DataError(f"{path}, line {number}: not a point of this version; remove the line")
            yield Point(**row)


def better(a: Point, b: Point, quality: Quality) -> bool:
    """True where `a` is strictly better than `b`; unknown is worst."""
    x, y = (getattr(p, quality) for p in (a, b))
    if x is None or y is None:
        return x is not None
    return x < y if quality == "kl" else x > y


def front(points: Sequence[Point], axis: Axis, quality: Quality) -> list[Point]:
    """The Pareto front: points than which no smaller (or faster) one is as good, from small to large.

    Of two points that `TIE` makes equal in size, only the better one is on it.
    """
    chosen: list[Point] = []
    known = [p for p in points if getattr(p, axis) is not None and getattr(p, quality) is not None]
    for point in sorted(known, key=lambda p: (getattr(p, axis), -p.agreement, p.kl)):
        if not chosen or better(point, chosen[-1], quality):
            if chosen and getattr(point, axis) <= getattr(chosen[-1], axis) * (1.0 + TIE):
                chosen.pop()
            chosen.append(point)
    return chosen


def standard_error(values: Tensor) -> float:
    """Of the mean of `values` [n]."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Verdict:
    """A point of the baseline beside the best point of a recipe under the same budget or a smaller one.

    Attributes:
        recipe: whose point is compared.
        baseline: the recipe that it is compared with.
        bits: mean bits of the baseline's point.
        baseline_kl, kl: nats.
        difference: `kl` - `baseline_kl`, mean over the images; negative is good.
        error: standard error of that paired difference.
    """

    recipe: str
    baseline: str
    bits: float
    baseline_kl: float
    kl: float
    difference: float
    error: float

    @property
    def text(self) -> str:
        """In a few words."""
        if self.difference == 0.0:
            return "equal"
        if abs(self.difference) <= NOISE * self.error:
            return "within noise"
        return "better" if self.difference < 0.0 else "worse"


def verdicts(sweep: Sweep, baselines: Sequence[str] = ("uniform",)) -> list[Verdict]:
    """Every point of each baseline against each recipe that is no baseline, or one further behind, by KL."""
    every, found = list(sweep.points.values()), list[Verdict]()
    recipes = dict.fromkeys(p.recipe for p in every)
    for number, baseline in enumerate(baselines, 1):
        for base in sorted((p for p in every if p.recipe == baseline), key=lambda p: p.asked_bits):
            for recipe in (r for r in recipes if r not in baselines[:number]):
                rivals = [p for p in every if p.recipe == recipe and p.asked_bits <= base.asked_bits]
                if rivals:
                    found.append(_verdict(sweep, base, min(rivals, key=lambda p: p.kl)))
    return found


def _verdict(sweep: Sweep, base: Point, best: Point) -> Verdict:
    change = sweep.kl(best) - sweep.kl(base)
    return Verdict(
        best.recipe, base.recipe, base.asked_bits, base.kl, best.kl, float(change.mean()), standard_error(change)
    )


def table(points: Iterable[Point]) -> str:
    """All points as CSV, with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [f.name for f in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(p) for p in ordered(points))
    return buffer.getvalue()


def ordered(points: Iterable[Point]) -> list[Point]:
    """By budget, and by recipe within it."""
    return sorted(points, key=lambda p: (p.asked_bits, p.recipe != "uniform", p.recipe))
