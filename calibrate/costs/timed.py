"""The costs of one calibration that need a latency table, made when a budget first asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lampq_rt.calibrate.costs.base import TIMED, Budget
from lampq_rt.calibrate.costs.latency import FP32, Latency
from lampq_rt.errors import BudgetError, TableError
from lampq_rt.latency import table as tables
from lampq_rt.latency.predict import Predictor
from lampq_rt.latency.table import LatencyTable


class TimedCosts:
    """Latency at any batch size, by unit: `costs["latency_ms@8"]`. The speed-up's cost is the same latency.

    Args:
        model: in floating point; its weights are not looked at.
        input_size: (C, H, W) of an image.
        target: of the plan ("any", "cpu", "cuda"): whose table is looked for.
        table: a table or its file; the present machine's by default.
    """

    def __init__(
        self, model: nn.Module, input_size: Sequence[int], target: str, table: LatencyTable | Path | None
    ) -> None:
        self._model, self._input_size, self._target = model, tuple(input_size), target
        self._table = table
        self._costs: dict[int, Latency] = {}

    @property
    def source(self) -> LatencyTable | Path | None:
        """The table or its file, as given or found so far."""
        return self._table

    @staticmethod
    def has(unit: str) -> bool:
        """True for units that need a table."""
        return unit.partition("@")[0] in TIMED

    @property
    def table(self) -> LatencyTable:
        """The table.

        Raises:
            TableError: there is none for this machine, it is malformed, or of a device that the plan is not for.
        """
        if not isinstance(self._table, LatencyTable):
            device = "cuda" if self._target == "cuda" else "cpu"
            self._table = LatencyTable.load(self._table) if self._table else tables.required(device)
        if self._target not in ("any", self._table.device):
            raise TableError(f"the latency table is of {self._table.where}; the plan's target is {self._target}")
        return self._table

    def __getitem__(self, unit: str) -> Latency:
        batch = int(unit.partition("@")[2])
        if batch not in self._costs:
            self._costs[batch] = Latency(Predictor(self.table, self._model, self._input_size, batch))
        return self._costs[batch]

    def limit(self, budget: Budget, unit: str) -> float:
        """Milliseconds that the budget allows.

        Raises:
            TableError: the table lacks what the model needs, or the baseline that the budget refers to.
        """
        times = budget.limits[unit]
        if not unit.startswith("speedup"):
            if isinstance(times, str) and math.isnan(self[unit].full):
                raise TableError(f"budget {unit} = {times}: the latency table has no {FP32} of this model; % is of it")
            return budget.resolve(unit, self[unit].full)
        if isinstance(times, str):
            raise BudgetError(f"budget {unit} = {times}; it must be a number of times")
        return self[unit].fastest[1] / times

    def inverse(self, limits: Mapping[str, float]) -> dict[str, float]:
        """See `Problem.inverse`."""
        return {unit: self[unit].fastest[1] for unit in limits if unit.startswith("speedup")}

    def facts(self, budget: Budget, costs: Mapping[str, float]) -> dict[str, Any]:
        """JSON-able: the table, and what it predicts of the plan at the budget's batch sizes. Empty without any."""
        if not budget.batches:
            return {}
        predicted = {int(unit.partition("@")[2]): ms for unit, ms in costs.items() if self.has(unit)}
        rows = []
        for batch in budget.batches:
            cost = self._costs[batch]
            fastest = cost.fastest if cost.baselines else None
            rows.append(
                {
                    "batch": batch,
                    "predicted_ms": predicted[batch],
                    "w8a8_ms": cost.constant,
                    "baseline": fastest and fastest[0],
                    "baseline_ms": fastest and fastest[1],
                }
            )
        table = self.table
        about = {"machine": table.machine, "device": table.device, "threads": table.threads, "written": table.written}
        return {"latency": {"table": about, "input_size": list(self._input_size), "rows": rows}}
