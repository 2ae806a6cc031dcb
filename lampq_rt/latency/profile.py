"""Fills a latency table with what one model needs: `lampq profile`.

Every op call is written as soon as it is timed, so that a run that is stopped goes on where it was. Calls that the
table has already, from this model or another with the same shapes, are not timed again unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lampq_rt import bench
from lampq_rt.errors import TableError
from lampq_rt.formats import FLOAT_BITS
from lampq_rt.latency import table as tables
from lampq_rt.latency.calls import Call
from lampq_rt.latency.predict import REFERENCE, Factors, Predictor, third_floating
from lampq_rt.latency.table import FLOAT, MIXED, OURS, LatencyTable, ModelEntry
from lampq_rt.latency.timing import time_call
from lampq_rt.plan import Plan
from lampq_rt.standin import stand_in_plan

AGAINST = ("eager", "compile")
"""Baselines that a budget of `speedup` refers to: the fastest of them."""


@dataclass(frozen=True)
class Timed:
    """One call of an op in the table.

    Attributes:
        key: its entry.
        latency_ms: milliseconds.
        fresh: False where the table had it.
    """

    key: str
    latency_ms: float
    fresh: bool


class Profile:
    """What of one model is still to be timed, and its timing.

    Args:
        model: in floating point, on the CPU; not changed.
        name: what entries call it.
        input_size: (C, H, W) of an image.
        batches: batch sizes.
        device: where to time, of this machine.
        path: table to fill; by default the user's own, which is looked up together with ours.
        again: time what the table has already, too.

    Raises:
        TableError: the table at `path` is malformed, or of another machine, device or number of threads.
        ModelError: the model is of no supported family.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        input_size: Sequence[int],
        batches: Sequence[int],
        device: torch.device,
        path: Path | None = None,
        *,
        again: bool = False,
    ) -> None:
        self.model, self.name, self.device, self.again = model, name, device, again
        self.input_size = tuple(input_size)
        blank = tables.empty(device)
        self.path = path or tables.user_path(blank)
        self.table = LatencyTable.load(self.path) if self.path.is_file() else blank
        if self.table.file_name != blank.file_name:
            raise TableError(f"latency table {self.path} is of {self.table.where}; this is {blank.where}")
        self._known = self.table if path else tables.find(device)
        self._predictors = {batch: Predictor(self._known, model, input_size, batch) for batch in batches}
        needed = {key: c.call for p in self._predictors.values() for key, c in p.needed().items()}
        self.needed: dict[str, Call] = dict(sorted(needed.items(), key=lambda item: -item[1].weight_bytes))

    @property
    def missing(self) -> list[str]:
        """Keys of the calls to time."""
        return [key for key in self.needed if self.again or key not in self._known.calls]

    def calls(self) -> Iterator[Timed]:
        """Time what is missing, one call a step; what the table has already comes first."""
        missing = self.missing
        yield from (Timed(k, self._known.calls[k], False) for k in self.needed if k not in set(missing))
        reference = next(iter(self._predictors.values())).reference
        footprint = sum(c.count * c.call.weight_bytes for c in reference.values())
        for key in missing:
            ms = time_call(self.needed[key], self.device, footprint)
            self._keep({key: ms}, {})
            yield Timed(key, ms, True)

    def models(
        self, against: Sequence[str] = AGAINST, rounds: int = bench.ROUNDS, progress: bench.Progress = lambda text: None
    ) -> tuple[list[ModelEntry], dict[str, str]]:
        """Measure the whole model, with 8 bits everywhere and in floating point, where the table has it not yet.

        Returns:
            One entry a batch size, and the baselines left out with their reasons.
        """
        left_out: dict[str, str] = {}
        entries = []
        for batch, predictor in self._predictors.items():
            known = self._known.models.get(predictor.fingerprint)
            if known is None or self.again:
                plans = self._plans(predictor)
                found = self._measure(batch, plans.pop(OURS), against, rounds, progress)
                left_out |= found.left_out
                times = {str(row["variant"]): float(row["latency_ms"]["median"]) for row in found.rows}
                for variant, plan in plans.items():
                    (row,) = self._measure(batch, plan, (), rounds, progress).rows
                    times[variant] = float(row["latency_ms"]["median"])
                known = ModelEntry(self.name, batch, times)
                self._keep({}, {predictor.fingerprint: known})
            entries.append(known)
        return entries, left_out

    def factors(self) -> dict[int, Factors]:
        """By batch size, how many times as long ops take inside the model as alone (see `Predictor.factors`)."""
        found = {}
        for batch, predictor in self._predictors.items():
            predictor.table = self._known
            found[batch] = predictor.factors()
        return found

    def _plans(self, predictor: Predictor) -> dict[str, Plan]:
        """Stand-ins for the compiled models that are measured, by variant."""
        images = torch.randn(2, *self.input_size, generator=torch.Generator().manual_seed(0))
        integer, floating = (stand_in_plan(self.model, images, bits) for bits in (REFERENCE, FLOAT_BITS))
        chosen = third_floating(predictor.description)
        islands = {name: floating.sites[name] for name, f in chosen.items() if all(x.is_float for x in f.values())}
        return {OURS: integer, FLOAT: floating, MIXED: integer.with_sites(islands)}

    def _measure(
        self, batch: int, plan: Plan, against: Sequence[str], rounds: int, progress: bench.Progress
    ) -> bench.Result:
        return bench.bench(
            self.model,
            plan,
            batches=[batch],
            against=against,
            device=self.device,
            rounds=rounds,
            name=self.name,
            input_size=self.input_size,  # type: ignore[arg-type]
            progress=progress,
        )

    def _keep(self, calls: dict[str, float], models: dict[str, ModelEntry]) -> None:
        """Add to the table, in memory and on disk."""
        self.table = self.table.updated(calls, models)
        self._known = self._known.updated(calls, models)
        self.table.save(self.path)
