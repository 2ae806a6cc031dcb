"""Rows of `benchmarks.peers` as the Markdown of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row, three
from lampq_rt.variants import OURS, VARIANTS

ORDER = ("fp32-eager", "bf16-eager", "bf16-compile")


def speed(rows: list[Row]) -> Iterator[str]:
    """Milliseconds of every variant, a line a model and batch size, a table a number of threads."""
    for threads in sorted({row["threads"] for row in rows}):
        group = [row for row in rows if row["threads"] == threads]
        variants = _order({row["variant"] for row in group})
        yield f"\nMilliseconds, median (20th–80th percentile). {_made(group)}\n"
        yield f"| model | batch | {' | '.join(_bold(v) for v in variants)} | lampq × fastest other |"
        yield "|---|---|" + "---|" * (len(variants) + 1)
        for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in group):
            cell = {row["variant"]: row for row in group if (row["model"], row["batch"]) == (model, batch)}
            times = " | ".join(_time(cell.get(variant)) for variant in variants)
            ratio = cell[OURS]["speedup"] if OURS in cell else None
            yield f"| {model} | {batch} | {times} | {'–' if ratio is None else f'{ratio:.2f}'} |"


def memory(rows: list[Row]) -> Iterator[str]:
    """Megabytes of every variant, each in a process of its own."""
    if rows:
        yield f"\nMegabytes, each variant in a process of its own. {_made(rows)}\n"
        yield "| model | batch | variant | weights as stored | growth up to a forward pass's peak | whole process |"
        yield "|---|---|---|---|---|---|"
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        cell = {row["variant"]: row for row in rows if (row["model"], row["batch"]) == (model, batch)}
        for variant in _order(set(cell)):
            sizes = (cell[variant][key] for key in ("weight_bytes", "peak_memory_bytes", "resident_bytes"))
            yield f"| {model} | {batch} | {_bold(variant)} | {' | '.join(map(_megabytes, sizes))} |"


def accuracy(rows: list[Row]) -> Iterator[str]:
    """What each INT8 loses to fp32 on the same images."""
    for model, count in dict.fromkeys((row["model"], row["images"]) for row in rows):
        cell = {row["variant"]: row for row in rows if (row["model"], row["images"]) == (model, count)}
        fp32 = next(iter(cell.values()))["fp32_top1"]
        yield f"\n**{model}**, {count} evaluation images, fp32 top-1 {fp32} %. {_versions(list(cell.values()))}\n"
        yield "| INT8 of | calibration images | top-1 % | points lost | agreement with fp32 % | KL (nats) |"
        yield "|---|---|---|---|---|---|"
        for variant in _order(set(cell)):
            row = cell[variant]
            facts = (row[key] for key in ("calib_images", "top1", "lost", "agreement", "kl"))
            yield f"| {_bold(variant)} | {' | '.join(map(str, facts))} |"


def _order(variants: set[str]) -> list[str]:
    """Floating point first, ours last."""
    known = [*ORDER, *(v for v in VARIANTS.names() if v not in (*ORDER, OURS)), OURS]
    return sorted(variants, key=lambda v: known.index(v) if v in known else len(ORDER))


def _bold(variant: str) -> str:
    return f"**{variant}**" if variant == OURS else variant


def _time(row: Row | None) -> str:
    if row is None:
        return "–"
    low, median, high = (three(row["latency_ms"][key]) for key in ("p20", "median", "p80"))
    return f"{f'**{median}**' if row['variant'] == OURS else median} ({low}–{high})"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}" if size < 1e8 else f"{size / 1e6:.0f}"


def _made(rows: list[Row]) -> str:
    """Machine, threads, dates, load of the machine, and versions."""
    dates = sorted({row["measured"][:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    loads = [row["load"] for row in rows]
    threads = rows[0]["threads"]
    busy = f"load of the machine {min(loads)} to {max(loads)}"
    return f"{rows[0]['machine']}, {threads} thread{'s' * (threads != 1)}, {when}, {busy}; {_versions(rows)}"


def _versions(rows: list[Row]) -> str:
    every: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            every.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in every.items()) + "."
