"""What the compilers make of every kernel that a model would start, and how fast that could be. Needs no GPU.

    python -m benchmarks.compile_report --arch 90 --model vit_base_patch16_224 --batch 1,64 --json report.json
    python -m benchmarks.compile_report --out docs/compile_report.md

Every number about a kernel is read from its assembly. Every number of milliseconds is PREDICTED, NOT MEASURED: it
comes from `roofline`, whose ceilings are assumptions.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import launches, roofline
from benchmarks.gpu.plan import MODELS
from benchmarks.markdown import put_between
from lampq_rt.kernels.gpu import offline
from lampq_rt.kernels.gpu.inspection import Compiled

EXAMPLE = "Example: python -m benchmarks.compile_report --arch 90,gfx942 --model deit_tiny_patch16_224 --batch 1,64"
PREDICTED = "predicted, not measured"

console = Console(width=160)


@dataclass(frozen=True)
class Kernel:
    """A binary, what it was made of, and which models start it."""

    launch: offline.Launch
    made: Compiled
    used_by: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        made, machine = self.made, roofline.MACHINES[self.made.arch]
        return {
            "arch": made.arch, "kernel": launches.label(self.launch), "used_by": list(self.used_by),
            "programs_per_processor": roofline.programs_per_processor(
                machine, made.registers, made.shared_bytes, self.launch.warps
            ),
            "warps": self.launch.warps, "instructions": made.instructions, **asdict(made),
            "constants": {k: v for k, v in self.launch.values.items() if k.isupper() and k != "M"},
        }  # fmt: skip


def main(
    arch: Annotated[str, typer.Option(help="Compute capabilities and AMD names.")] = "80,89,90,100,gfx942",
    model: Annotated[str, typer.Option(help="timm models.")] = ",".join(MODELS),
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64,256",
    form: Annotated[str, typer.Option("--format", help="Of W8A8, W4A8, W4A4.")] = ",".join(launches.FORMATS),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every fact as JSON.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the tables, between two markers.")] = None,
) -> None:
    """Compile every kernel that these models start, count, and predict."""
    arches = [a if a.startswith(("sm", "gfx")) else f"sm{a}" for a in arch.split(",")]
    names, batches, forms = model.split(","), [int(b) for b in batch.split(",")], form.split(",")
    for what, given, allowed in (("architecture", arches, offline.PROCESSORS), ("format", forms, launches.FORMATS)):
        for name in given:
            if name not in allowed:
                raise typer.BadParameter(f"unknown {what} {name!r}; allowed: {', '.join(allowed)}")
    cases = [(a, n, f, b) for a in arches for n in names for f in forms for b in batches]
    started = {case: launches.started(case[1], case[2], case[3], case[0]) for case in track(cases, "recording")}
    kernels = compile_all(started)
    facts = [kernel.facts() for kernel in kernels.values()]
    rows = list(predictions(started, kernels))
    show(facts, rows)
    if json_file is not None:
        json_file.write_text(json.dumps({"triton": triton.__version__, "kernels": facts, PREDICTED: rows}, indent=1))
    if out is not None:
        put_between(out, "compile", markdown(facts, rows), "Compile report")


Case = tuple[str, str, str, int]
"""(architecture, model, format, batch)."""


def compile_all(started: dict[Case, list[launches.Started]]) -> dict[str, Kernel]:
    """Every distinct binary, by its launch's key."""
    users: dict[str, set[str]] = defaultdict(set)
    first: dict[str, offline.Launch] = {}
    for (_, name, form, batch), of_model in started.items():
        for one in of_model:
            users[one.launch.key].add(f"{name} {form} b{batch}")
            first.setdefault(one.launch.key, one.launch)
    return {
        key: Kernel(launch, offline.compile_launch(launch), tuple(sorted(users[key])))
        for key, launch in track(first.items(), "compiling")
    }


def predictions(started: dict[Case, list[launches.Started]], kernels: dict[str, Kernel]) -> Iterator[dict[str, Any]]:
    """A row a machine, model and batch: milliseconds by format and of the bf16 baseline."""
    for arch, name, batch in dict.fromkeys((a, n, b) for a, n, _, b in started):
        machine = roofline.MACHINES[arch]
        if math.isnan(machine.bandwidth):  # no ceilings
            continue
        floor, predicted = roofline.total_ms(roofline.bf16_baseline(launches.shape_of(name), batch, machine), machine)
        row: dict[str, Any] = {"machine": machine.name, "model": name, "batch": batch}
        row["bf16"] = {"floor_ms": floor, "predicted_ms": predicted}
        for form in (f for a, n, f, b in started if (a, n, b) == (arch, name, batch)):
            works = [launches.work_of(one, kernels[one.launch.key].made) for one in started[arch, name, form, batch]]
            floor, ours = roofline.total_ms(works, machine)
            held: dict[str, float] = defaultdict(float)
            for work in works:
                held[roofline.limit(work, machine)] += work.count * roofline.floor_s(work, machine) * 1e3
            row[form] = {
                "floor_ms": floor, "predicted_ms": ours, "ratio": predicted / ours,
                "floor_ms_by_limit": dict(held), "kernels": sum(w.count * (1 + w.extra_launches) for w in works),
                "operations": sum(w.count * w.operations for w in works),
                "bytes": sum(w.count * w.bytes for w in works),
            }  # fmt: skip
        yield row


COLUMNS = (
    "kernel", "binaries", "registers", "spills", "shared KB", "programs a processor", "matrix", "load B", "store B",
    "bytewise", "instructions",
)  # fmt: skip
MIX = (
    "permute", "logic", "multiply-add", "convert", "special", "global load", "global store", "async copy",
    "shared load", "shared store", "barrier",
)  # fmt: skip


def table_rows(facts: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """One row a kernel's label: ranges over its binaries (head counts, sizes that divide by 16 or do not)."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for fact in facts:
        groups[fact["kernel"]].append(fact)
    for name, group in sorted(groups.items()):

        def over(key: str, group: list[dict[str, Any]] = group, scale: int = 1) -> str:
            values = sorted({fact[key] // scale for fact in group})
            return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"

        one = group[0]
        kind = "IGMMA" if one["wgmma"] else "MFMA" if one["mfma"] else "IMMA" if one["mma"] else ""
        matrix = one["mix"].get("matrix", 0)
        widths = [
            "/".join(str(w) for w in sorted({w for fact in group for w in fact[key]}, reverse=True))
            for key in ("load_bytes", "store_bytes")
        ]
        bytewise = max(sum(f[k] for k in ("byte_accesses", "byte_shared_loads", "byte_shared_stores")) for f in group)
        yield (
            name, str(len(group)), over("registers"), over("spills"), over("shared_bytes", scale=1024),
            over("programs_per_processor"), f"{matrix} {kind}" if matrix else "", *widths, str(bytewise),
            over("instructions"),
            *(f"{one['mix'].get(c, 0) / (matrix or 1):.3g}" for c in MIX),
        )  # fmt: skip


def show(facts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """For people at a terminal."""
    for arch in dict.fromkeys(fact["arch"] for fact in facts):
        table = Table(*COLUMNS, title=f"{arch}: counted in the assembly")
        for row in table_rows([fact for fact in facts if fact["arch"] == arch]):
            table.add_row(*row[: len(COLUMNS)])
        console.print(table)
    if not rows:
        return
    header, lines = prediction_table(rows)
    table = Table(*header, title=f"milliseconds of one forward pass: {PREDICTED}")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def prediction_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the milliseconds."""
    forms = [form for form in launches.FORMATS if any(form in row for row in rows)]
    header = ["machine", "model", "batch", "bf16 floor", "bf16 predicted"]
    for form in forms:
        header += [f"{form} floor", f"{form} predicted", f"{form} ratio"]
    lines = []
    for row in rows:
        line = [row["machine"], row["model"], str(row["batch"])]
        line += [f"{row['bf16'][k]:.3f}" for k in ("floor_ms", "predicted_ms")]
        for form in forms:
            of = row[form]
            line += [f"{of['floor_ms']:.3f}", f"{of['predicted_ms']:.3f}", f"{of['ratio']:.2f}"]
        lines.append(line)
    return header, lines


def _markdown_table(header: list[str], lines: list[tuple[str, ...]] | list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    yield from ("| " + " | ".join(line) + " |" for line in lines)


def markdown(facts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The tables for a page."""
    if rows:
        yield from _predicted(rows)
    for arch in dict.fromkeys(fact["arch"] for fact in facts):
        yield f"\n## {arch}: counted in the assembly (Triton {triton.__version__})\n"
        header = [*COLUMNS, *MIX]
        yield from _markdown_table(header, list(table_rows([fact for fact in facts if fact["arch"] == arch])))
    yield ""


def _predicted(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Assumptions, then what follows from them."""
    yield f"\n## Milliseconds: {PREDICTED}\n"
    yield "ASSUMED ceilings (none was measured):\n"
    header = ["machine", "TB/s", "int8 TOP/s", "bf16 TFLOP/s", "processors", "GHz", "gap µs", "efficiency", "from"]
    machines = [m for m in roofline.MACHINES.values() if m.name in {row["machine"] for row in rows}]
    lines = [
        [m.name, f"{m.bandwidth / 1e12:g}", f"{m.int8 / 1e12:g}", f"{m.bf16 / 1e12:g}", str(m.processors),
         f"{m.clock / 1e9:g}", f"{m.gap_s * 1e6:g}", f"{m.efficiency:g}", m.source]
        for m in machines
    ]  # fmt: skip
    yield from _markdown_table(header, lines)
    yield f"\nOne forward pass; every time and ratio below is {PREDICTED}:\n"
    yield from _markdown_table(*prediction_table(rows))


def _command() -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command(epilog=EXAMPLE)(main)
    return app


if __name__ == "__main__":
    _command()()
