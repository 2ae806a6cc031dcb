"""`lampq tune`: the fastest tiles of every linear of a model, on the GPU that is there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from lampq_rt.cli_common import Json, Model, Output, check_destination, names, numbers, plural

if TYPE_CHECKING:
    from lampq_rt.kernels.gpu.tune import Tuned
    from lampq_rt.kernels.gpu.work import LinearWork


def tune(
    model: Model,
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes that will be served.")] = "1,64",
    formats: Annotated[
        str, typer.Option(metavar="NAME,…", help="Widths of weights and activations: w8a8, w4a8, w4a4.")
    ] = "w8a8,w4a8,w4a4",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Table to write; by default the user's own, which models read."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Tune what the table has already, too.")] = False,
    json: Json = None,
) -> None:
    """Time the kernels of every linear of a model on this machine's GPU, and keep the fastest of each.

    Every shape is written as soon as it is found: a run that is stopped goes on where it was.

    \b
    Examples:
      lampq tune vit_base_patch16_224 --batch 1,64
      lampq tune deit_small_patch16_224 --formats w8a8 --out sm90.json
    """
    import timm
    import torch

    from lampq_rt import tuning
    from lampq_rt.images import preprocessing
    from lampq_rt.kernels.gpu import tables
    from lampq_rt.kernels.gpu import tune as tuner
    from lampq_rt.models import check_name

    output = Output(json)
    check_name(model)
    sizes, wanted = numbers(batch, "--batch"), [tuning.check_format(name) for name in names(formats)]
    if out is not None:
        check_destination(out, "table")
    arch = tuning.gpu_architecture()
    table = out or tables.user_table(arch)
    with torch.device("meta"):
        network = timm.create_model(model)
    works = tuning.launches(network, preprocessing(model).config["input_size"], sizes, wanted)
    started = time.perf_counter()
    found = list(output.steps(tuner.tune_all(works, arch, table, again=again), len(works), f"tuning for {arch}"))
    facts = {
        "model": model,
        "architecture": arch,
        "table": str(table),
        "seconds": round(time.perf_counter() - started, 3),
        "rows": [_row(work, tuned) for work, tuned in found],
    }
    fresh = [(work, tuned) for work, tuned in found if tuned is not None]
    if fresh:
        output.show(_table(fresh, f"{model} on {arch}"))
    kept = len(found) - len(fresh)
    also = f", {plural(kept, 'shape')} found there already (--again tunes them anew)" if kept else ""
    output.show(f"{plural(len(fresh), 'shape')} tuned{also}; {table}")
    output.facts(facts)


def _row(work: LinearWork, tuned: Tuned | None) -> dict[str, Any]:
    """One shape; what was not timed now is null."""
    row: dict[str, Any] = {"key": work.key, "m": work.m, "n": work.n, "k": work.k}
    if tuned is None:
        return {**row, "latency_ms": None, "rule_ms": None, "config": None}
    return {**row, "latency_ms": tuned.ms, "rule_ms": tuned.rule_ms, "config": tuned.config and tuned.config.to_json()}


def _table(fresh: list[tuple[LinearWork, Tuned]], title: str) -> Group:
    from lampq_rt.inspect_plan import titled

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("linear", "m", "n", "k", "ms", "TOP/s", "×", "tile"):
        table.add_column(column, justify="left" if column in ("linear", "tile") else "right", no_wrap=True)
    for work, tuned in fresh:
        tile, config = "two kernels", tuned.config
        if config is not None:
            columns = "row" if work.epilogue == "rows" else config.block_n
            split = f" split {config.split_k}" if config.split_k > 1 else ""
            tile = f"{config.block_m}×{columns}×{config.block_k}{split}"
        table.add_row(
            f"{work.epilogue} w{work.w_bits}a{work.a_bits}",
            str(work.m),
            str(work.n),
            str(work.k),
            f"{tuned.ms:.4f}",
            f"{work.operations / tuned.ms / 1e9:.0f}",
            "–" if tuned.rule_ms is None else f"{tuned.rule_ms / tuned.ms:.2f}",
            tile,
        )
    table.caption = "×: times as fast as the tile that the rule of thumb gives; rows: as linear and LayerNorm apart"
    table.caption_justify = "left"
    return titled(title, table)
