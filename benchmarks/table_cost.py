"""What levels from a table, and non-uniform softmax output, cost when a model runs: 4-bit plans beside W8A8.

    python -m benchmarks.table_cost [--model NAME] [--batch 1 --batch 8] [--rounds 15] [--threads 1]

Random weights and stand-in steps: time does not depend on them. Plans take turns in one process, and a ratio is that
of two turns of the same round, so that other work on the machine moves both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends
from lampq_rt.compiler import CompiledModel
from lampq_rt.formats import Format
from lampq_rt.memory import keep_memory
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.sites import Kind
from lampq_rt.standin import stand_in_plan

BASE = "W8A8"
BITS = 4
TURN_SECONDS = 0.15

console = Console(highlight=False)


def plans(model: nn.Module, images: Tensor) -> dict[str, Plan]:
    """W8A8, and 4 bits with tables before the blocks' linears, with softmax in every scheme."""
    narrow = stand_in_plan(model, images, {"default": BITS, "head": 8, "patch_embed": 8}, input_bits=8)
    tables = narrow.with_sites({name: _with_table(p) for name, p in narrow.sites.items()})
    found = {BASE: stand_in_plan(model, images, 8), "tables": tables}
    return found | {f"tables, {scheme}": _with_softmax(tables, scheme) for scheme in ("log2", "cubic")}


def _with_softmax(plan: Plan, scheme: str) -> Plan:
    """The plan with its softmax output in that scheme."""
    p, pv = Format(BITS, scheme, "row", True), {n: s for n, s in plan.sites.items() if s.kind is Kind.PV}
    return plan.with_sites({name: replace(site, formats={**site.formats, "p": p}) for name, site in pv.items()})


def _with_table(params: SiteParams) -> SiteParams:
    """The site with 16 levels of its 8-bit grid."""
    if params.kind not in backends.TABLE_KINDS:
        return params
    levels = (torch.arange(-128, 128) >> (8 - BITS) << (8 - BITS)).to(torch.int8)
    formats = {**params.formats, "input": Format(BITS, "table", "tensor", False)}
    return replace(params, formats=formats, tensors={**params.tensors, "input.table": levels})


def turn(model: CompiledModel, images: Tensor) -> float:
    """Milliseconds of the fastest forward pass of a turn."""
    times: list[float] = []
    while sum(times) < TURN_SECONDS or len(times) < 3:
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def compare(models: Mapping[str, CompiledModel], images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row a model: its time, and that over the base's, 20th percentile, median and 80th."""
    for model in models.values():
        turn(model, images)
    times = torch.tensor([[turn(model, images) for model in models.values()] for _ in range(rounds)]).double()
    at = torch.tensor([0.2, 0.5, 0.8]).double()
    ms, ratio = (x.quantile(at, 0).t().tolist() for x in (times, times / times[:, :1]))
    return [{"batch": len(images), "plan": n, "ms": ms[i], "ratio": ratio[i]} for i, n in enumerate(models)]


def main(
    model: Annotated[str, typer.Option(help="timm name.")] = "deit_tiny_patch16_224",
    batch: Annotated[list[int], typer.Option(help="Images at once; may be repeated.")] = [1, 8],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Turns of every plan.")] = 15,
    threads: Annotated[int, typer.Option(help="Of the kernels.")] = 1,
) -> None:
    """Print the times as a table, then as one line of JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    keep_memory()
    net: nn.Module = timm.create_model(model).float().eval()
    images = torch.randn(max(batch), 3, *net.patch_embed.img_size)
    compiled = {name: lampq_rt.compile(net, plan) for name, plan in plans(net, images[:1]).items()}
    with torch.inference_mode():
        rows = [row for size in batch for row in compare(compiled, images[:size], rounds)]
    for row in rows:
        ms, ratio = ("{1:.3f} ({0:.3f} to {2:.3f})".format(*row[key]) for key in ("ms", "ratio"))
        console.print(f"batch {row['batch']}  {row['plan']:<13} {ms} ms  {ratio} times {BASE}", soft_wrap=True)
    console.print(json.dumps({"model": model, "threads": threads, "rows": rows}), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
