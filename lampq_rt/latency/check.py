"""Predicted against measured: the compiled model of a plan that was made under a budget of latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table
from torch import nn

from lampq_rt import bench
from lampq_rt.inspect_plan import titled
from lampq_rt.memory import keep_memory
from lampq_rt.plan import Plan

TOLERANCE = 0.10
"""By which share a prediction may miss; beyond it the table is wrong."""


def predictions(plan: Plan) -> list[Mapping[str, Any]]:
    """What the plan records of its predicted latency, a row a batch size; empty without a budget of latency."""
    found = plan.provenance.get("latency")
    rows = found.get("rows") if isinstance(found, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) else []


def machine(plan: Plan) -> str:
    """The machine of the table that the predictions come from, for people."""
    table = plan.provenance["latency"].get("table", {})
    threads = f", {table.get('threads')} threads" if table.get("device") == "cpu" else ""
    return f"{table.get('machine', '–')}{threads}".replace(", 1 threads", ", 1 thread")


def obstacle(plan: Plan) -> str | None:
    """Why this process cannot check the plan's predictions, or None: another machine, other threads."""
    table = plan.provenance["latency"]["table"]
    if table["device"] == "cuda" and not torch.cuda.is_available():
        return f"the table is of {machine(plan)}, and there is no GPU here"
    here = bench.machine(torch.device(table["device"]))
    if here != table["machine"]:
        return f"the table is of {machine(plan)}, this is {here}"
    if table["device"] == "cpu" and torch.get_num_threads() != table["threads"]:
        return f"the table is of {machine(plan)}, but this process has {torch.get_num_threads()} threads"
    return None


def measure(model: nn.Module, plan: Plan, rounds: int = bench.ROUNDS) -> dict[int, float]:
    """Median milliseconds of the compiled model, by batch size of the plan's predictions.

    Args:
        model: in floating point, with the weights that the plan was made for.
        plan: with predictions of this machine (see `obstacle`).
        rounds: how often each is timed, about 0.2 s a time.
    """
    keep_memory()
    latency = plan.provenance["latency"]
    batches = [int(row["batch"]) for row in predictions(plan)]
    result = bench.bench(
        model,
        plan,
        batches=batches,
        against=(),
        device=latency["table"]["device"],
        rounds=rounds,
        input_size=tuple(latency["input_size"]),
    )
    return {int(row["batch"]): float(row["latency_ms"]["median"]) for row in result.rows}


def facts(plan: Plan, measured: Mapping[int, float]) -> list[dict[str, Any]]:
    """JSON-able rows: what was predicted, measured (null where it was not), and the share by which they differ."""
    rows = []
    for row in predictions(plan):
        found = measured.get(row["batch"])
        error = None if found is None else round(row["predicted_ms"] / found - 1.0, 4)
        rows.append({**row, "measured_ms": found, "error": error})
    return rows


def report(plan: Plan, measured: Mapping[int, float]) -> Group:
    """The same as a table for people."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("batch", "predicted", "measured", "error", "W8A8", "floating point", "×"):
        table.add_column(column, justify="right", no_wrap=True)
    off = False
    for row in facts(plan, measured):
        found, error, baseline = row["measured_ms"], row["error"], row.get("baseline_ms")
        off = off or (error is not None and abs(error) > TOLERANCE)
        table.add_row(
            str(row["batch"]),
            f"{row['predicted_ms']:.4g}",
            "–" if found is None else f"{found:.4g}",
            "–" if error is None else f"{100 * error:+.1f} %",
            f"{row['w8a8_ms']:.4g}",
            "–" if baseline is None else f"{baseline:.4g} ({row['baseline']})",
            "–" if baseline is None else f"{baseline / row['predicted_ms']:.2f}",
        )
    table.caption = "ms; ×: times as fast as the fastest in floating point, as predicted"
    if off:
        table.caption += f"\nmore than {100 * TOLERANCE:.0f} % off: other work on the machine, or a table to make anew"
    table.caption_justify = "left"
    return titled(f"Latency on {machine(plan)}", table)
