"""What `lampq frontier` works on: the model, its images, and the one calibration that all plans come from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lampq_rt.cli_common import Output, plural, true_classes
from lampq_rt.errors import DataError
from lampq_rt.files import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lampq_rt.plan import Plan

BATCH = 25


@dataclass(kw_only=True)
class Bench:
    """The model with its images, which are read when they are first needed.

    A sweep that is complete reads the weights, whose digest and latency it asks for, and names and sizes of the images;
    it calibrates and evaluates nothing.

    Attributes:
        train_images: number of images to train on, of the same folder as those to calibrate on; None: no recipe trains.
        report: told of the progress of the calibration.

    Raises:
        DataError: a folder without images, or images that are evaluated on although a plan has seen them.
    """

    output: Output
    model: str
    weights: Path | None
    images: Path
    eval_images: Path
    labels: Path | None
    calib_images: int
    train_images: int | None
    limit: int | None
    seed: int
    target: str
    device: str
    batch: int

    def __post_init__(self) -> None:
        from lampq_rt import images as pictures

        self.report: Callable[[str, int, int], None] = lambda stage, done, total: None
        files = pictures.list_images(self.images)
        self.calibration_files = pictures.choose(files, self.calib_images, self.seed)
        if len(self.calibration_files) < self.calib_images:
            count = plural(len(self.calibration_files), "image")
            self.output.note(f"{self.images} holds {count}, fewer than the {self.calib_images} asked for")
        self.training_files: list[Path] = []
        if self.train_images is not None:
            self.training_files = pictures.choose(files, self.train_images, self.seed)
        self.every_file = pictures.list_images(self.eval_images)
        self.evaluation_files = pictures.spread(self.every_file, self.limit)
        _refuse_seen([*self.calibration_files, *self.training_files], self.evaluation_files)
        self.preprocess = pictures.preprocessing(self.model)

    @cached_property
    def network(self) -> nn.Module:
        """The floating-point model."""
        from lampq_rt.models import load_model

        return load_model(self.model, self.weights)

    @cached_property
    def truth(self) -> Tensor | None:
        """int64 [images], the classes of the evaluation images."""
        return true_classes(self.labels, self.eval_images, self.every_file, self.evaluation_files, self.network)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """What all points of a sweep share."""
        from lampq_rt.plan import weights_digest
        from lampq_rt.version import __version__

        truth = self.truth
        training = _digest(self.images, self.training_files)
        return {
            "model": self.model,
            "version": __version__,
            "seed": self.seed,
            "weights": weights_digest(self.network),
            "calibration images": _digest(self.images, self.calibration_files),
            "evaluation images": _digest(self.eval_images, self.evaluation_files),
            "labels": None if truth is None else hashlib.sha256(repr(truth.tolist()).encode()).hexdigest(),
            "target": self.target,
            "device": self.device,
            "latency batch": self.batch,
            **({"training images": training} if self.training_files else {}),
        }

    @cached_property
    def calibration(self) -> Any:
        """Measured once; plans of all budgets are made from it."""
        from lampq_rt import images as pictures
        from lampq_rt.calibrate import Material, calibrate

        more = pictures.load_images(self.training_files, self.preprocess) if self.training_files else None
        return calibrate(
            self.network,
            pictures.load_images(self.calibration_files, self.preprocess),
            target=self.target,
            seed=self.seed,
            device=self.device,
            model_name=self.model,
            material=Material(more),
            report=lambda stage, done, total: self.report(stage, done, total),
        )

    def load(self) -> None:
        """Read the images, so that one that cannot be read is found before anything is written."""
        assert self.calibration is not None

    def plan(self, recipe: str, bits: float, state: Path) -> Plan:
        """The plan of that recipe at that budget, with bars on standard error; `state` is of its training."""
        from lampq_rt.calibrate import Budget
        from lampq_rt.calibrate.progress import reporting

        self.output.aside.print(f"[bold]{recipe} at {bits:g} bits[/bold]")
        with reporting(True) as self.report:
            return self.calibration.plan(Budget(mean_bits=bits), recipe, state)

    def batches(self, text: str = "evaluating") -> Iterator[Tensor]:
        """The evaluation images, with a bar."""
        from lampq_rt import images as pictures

        batches: Iterable[Tensor] = pictures.batches(self.evaluation_files, self.preprocess, BATCH)
        return self.output.track(batches, len(self.evaluation_files), text)


def _refuse_seen(seen: Sequence[Path], evaluated: Sequence[Path]) -> None:
    """Refuse to evaluate on pictures that plans are made from, whatever their names: nobody would learn from that.

    Only files of equal sizes are read, so that large folders cost nothing.

    Raises:
        DataError: says how many there are, and names one.
    """
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(seen):
        by_size[path.stat().st_size].append(path)
    known = dict[int, set[bytes]]()
    twice = []
    for path in evaluated:
        size = path.stat().st_size
        if size in by_size:
            if size not in known:
                known[size] = {_content(other) for other in by_size[size]}
            if _content(path) in known[size]:
                twice.append(path)
    if twice:
        raise DataError(
            f"{plural(len(twice), 'image')} of the {len(evaluated)} to evaluate on would be calibrated or trained on, "
            f"too ({shown(twice[0])}); give --images and --eval-images that share none"
        )


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest(folder: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and sizes."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}\n".encode())
    return f"{len(files)} files, {digest.hexdigest()[:32]}"
