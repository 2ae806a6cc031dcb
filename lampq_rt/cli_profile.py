"""`lampq profile`: a latency table of this machine, for budgets in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from lampq_rt.cli_common import (
    Json,
    Model,
    Output,
    Threads,
    check_destination,
    names,
    numbers,
    plural,
    use_threads,
)

if TYPE_CHECKING:
    from lampq_rt.latency.predict import Factors
    from lampq_rt.latency.profile import Profile, Timed
    from lampq_rt.latency.table import ModelEntry


def profile(
    model: Model,
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes that will be served.")] = "1,8",
    device: Annotated[str, typer.Option(help="Where it will be served: cpu or cuda.")] = "cpu",
    threads: Threads = None,
    against: Annotated[
        str, typer.Option(metavar="NAME,…", help="Baselines for budgets of speedup; as of bench, also none.")
    ] = "eager,compile",
    rounds: Annotated[int, typer.Option(help="Turns of each whole model.", min=1)] = 10,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Table to fill; by default the user's own, which calibrate reads."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Time what the table has already, too.")] = False,
    json: Json = None,
) -> None:
    """Time the ops of a model in every format on this machine, for budgets of latency.

    Every op is written as soon as it is timed: a run that is stopped goes on where it was.

    \b
    Examples:
      lampq profile deit_small_patch16_224 --batch 1,8
      lampq profile vit_base_patch16_224 --batch 8 --device cuda --out h100.json
    """
    from lampq_rt import backends
    from lampq_rt import bench as benchmark
    from lampq_rt.images import preprocessing
    from lampq_rt.latency.profile import Profile
    from lampq_rt.memory import keep_memory
    from lampq_rt.models import check_name, load_model

    output = Output(json)
    check_name(model)
    sizes, rivals = numbers(batch, "--batch"), [name for name in names(against) if name != "none"]
    benchmark.variants(rivals)
    if out is not None and out.absolute().parent.is_dir():  # the table makes its folder where there is none
        check_destination(out, "latency table")
    target = backends.resolve(device)
    use_threads(threads)
    keep_memory()
    started = time.perf_counter()
    with output.working(f"reading the ops of {model}"):
        network = load_model(model, None, random=True)
        found = Profile(network, model, preprocessing(model).config["input_size"], sizes, target, out, again=again)
    timed = list(output.steps(found.calls(), len(found.needed), "timing ops"))
    with output.working("timing whole models") as say:
        entries, left_out = found.models(rivals, rounds, say)
    factors = found.factors()
    output.show(_ops_table(timed, f"{model} on {found.table.where}"), _models_table(entries, factors))
    for variant, reason in left_out.items():
        output.note(f"{variant} left out: {reason}")
    fresh = sum(t.fresh for t in timed)
    kept = f", {plural(len(timed) - fresh, 'op')} known already" if fresh < len(timed) else ""
    output.show(f"{plural(fresh, 'op')} timed{kept}; {found.path}")
    output.facts(_facts(model, found, timed, entries, factors, time.perf_counter() - started))


def _facts(
    model: str,
    found: Profile,
    timed: Sequence[Timed],
    entries: Sequence[ModelEntry],
    factors: Mapping[int, Factors],
    seconds: float,
) -> dict[str, Any]:
    from lampq_rt.latency.predict import FAMILIES

    return {
        "model": model,
        "machine": found.table.machine,
        "device": found.table.device,
        "threads": found.table.threads,
        "table": str(found.path),
        "seconds": round(seconds, 3),
        "ops": [{"key": t.key, "latency_ms": t.latency_ms, "fresh": t.fresh} for t in timed],
        "models": [
            {
                "batch": e.batch,
                "latency_ms": dict(e.latency_ms),
                "factors": dict(zip(FAMILIES, factors[e.batch], strict=True)),
            }
            for e in entries
        ],
    }


def _ops_table(timed: Sequence[Timed], title: str) -> Group:
    from lampq_rt.inspect_plan import titled

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("op", overflow="fold")
    for one in sorted(timed, key=lambda t: -t.latency_ms):
        table.add_row(f"{one.latency_ms:.4f}", one.key, style=None if one.fresh else "dim")
    return titled(title, table)


def _models_table(entries: Sequence[ModelEntry], factors: Mapping[int, Factors]) -> Group:
    from lampq_rt.inspect_plan import titled

    variants = list(dict.fromkeys(variant for entry in entries for variant in entry.latency_ms))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("batch", *variants, "f_int", "f_convert", "f_float"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        times = [f"{entry.latency_ms[v]:.4g}" if v in entry.latency_ms else "–" for v in variants]
        table.add_row(str(entry.batch), *times, *(f"{f:.2f}" for f in factors[entry.batch]))
    table.caption = "ms; lampq: 8 bits everywhere; f: how many times as long ops take inside the model as alone"
    table.caption_justify = "left"
    return titled("Whole models", table)
