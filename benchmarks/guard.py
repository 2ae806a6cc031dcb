"""Regression guard: ratios of speed beside the committed ones, in two minutes. `make bench-smoke`.

    python -m benchmarks.guard [--renew]

A time says as much of the machine's other work as of the code. A ratio of two times, taken by turns in one process on
one thread, moves far less, so that is what benchmarks/results/ratios.json holds: how many times as fast as PyTorch's
bf16 the integer models are, one block of a ViT-Base, and two ops. Worse by more than its band is a failure (exit
status 1), on the kind of processor where the file was made; on another the comparison is shown, and nothing fails,
since processors differ in what int8 gains. A ratio that looks worse is measured once more before it counts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.harness import RESULTS
from lampq_rt import bench, files
from lampq_rt.errors import DataError
from lampq_rt.kernels import reference
from lampq_rt.kernels.ops import NATIVE
from lampq_rt.memory import keep_memory
from lampq_rt.standin import stand_in_plan
from lampq_rt.variants import OURS

COMMITTED = RESULTS / "ratios.json"
RIVAL = "bf16-eager"
BAND = 0.15
"""By how much a ratio may fall short of the committed one, as a share of it, where the file says nothing else."""

ROUNDS, SECONDS = 9, 8.0
"""Turns of each contender, and the time after which a comparison stops (two rounds at least)."""

TURN_SECONDS = 0.05

Call = Callable[[], Any]
Measure = Callable[[], float]
console = Console(highlight=False)


@dataclass(frozen=True)
class Verdict:
    """One ratio beside the committed one (None: not committed yet)."""

    name: str
    ratio: float
    committed: float | None
    band: float

    @property
    def worse(self) -> bool:
        """Whether it fell out of its band."""
        return self.committed is not None and self.ratio < self.committed * (1 - self.band)


def model_ratio(name: str, batch: int, **options: Any) -> float:
    """How many times as fast as bf16 W8A8 is, with random weights."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **options).float().eval()
    size: tuple[int, int, int] = (3, *model.patch_embed.img_size)
    plan = stand_in_plan(model, torch.randn(1, *size), 8)
    found = bench.bench(
        model, plan, batches=[batch], against=[RIVAL], rounds=ROUNDS, limit_seconds=SECONDS, input_size=size
    )
    return next(float(row["speedup"]) for row in found.rows if row["variant"] == OURS)


def attention_ratio() -> float:
    """The integer attention of DeiT-Small at batch 8 against `scaled_dot_product_attention` in bf16."""
    batch, heads, tokens, width = 8, 6, 197, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randint(-100, 100, (batch, heads, tokens, width), generator=generator).to(torch.int8) for _ in range(3)
    )
    scales = (torch.full((heads,), 1e-3), torch.full((heads,), 0.01))
    args = (q, k, reference.transpose_v(v), *scales, 8, "rowmax", 1.0, 0, 8, torch.uint8)
    floats = [torch.randn(batch, heads, tokens, width, generator=generator).bfloat16() for _ in range(3)]
    return call_ratio(lambda: NATIVE.attention(*args), lambda: F.scaled_dot_product_attention(*floats))


def layernorm_ratio() -> float:
    """LayerNorm with quantisation, DeiT-Small at batch 8, against `layer_norm` in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 197, 384, generator=generator)
    weight, bias, half = torch.ones(384), torch.zeros(384), x.bfloat16()
    half_weight, half_bias = weight.bfloat16(), bias.bfloat16()
    return call_ratio(
        lambda: NATIVE.layernorm_quantize(x, weight, bias, 1e-6, 20.0, 0, 8, torch.uint8),
        lambda: F.layer_norm(half, (384,), half_weight, half_bias, 1e-6),
    )


def call_ratio(ours: Call, theirs: Call) -> float:
    """How many times as fast `ours` is: the median over rounds of the ratio within one."""
    timers, counts = [], []
    for call in (ours, theirs):
        call()
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        timers.append(timer)
        counts.append(max(1, round(TURN_SECONDS / timer.timeit(3).mean)))
    ratios = []
    for _ in range(3 * ROUNDS):
        own, other = (timer.timeit(count).mean for timer, count in zip(timers, counts, strict=True))
        ratios.append(other / own)
    return statistics.median(ratios)


MEASURES: Mapping[str, Measure] = {
    "attention op, DeiT-Small b8": attention_ratio,
    "layernorm op, DeiT-Small b8": layernorm_ratio,
    "deit_tiny b1": partial(model_ratio, "deit_tiny_patch16_224", 1),
    "deit_tiny b8": partial(model_ratio, "deit_tiny_patch16_224", 8),
    "deit_small b1": partial(model_ratio, "deit_small_patch16_224", 1),
    "vit_base, one block, b1": partial(model_ratio, "vit_base_patch16_224", 1, depth=1),
}


def judge(measures: Mapping[str, Measure], committed: Mapping[str, Any]) -> list[Verdict]:
    """Measure all; what looks worse once more, and the better of the two counts."""
    verdicts = []
    with torch.inference_mode():
        for name, measure in measures.items():
            known = committed.get(name, {})
            verdict = Verdict(name, measure(), known.get("ratio"), known.get("band", BAND))
            if verdict.worse:
                verdict = Verdict(name, max(verdict.ratio, measure()), verdict.committed, verdict.band)
            verdicts.append(verdict)
    return verdicts


def main(
    renew: Annotated[bool, typer.Option(help="Write what was measured as the ratios to compare with.")] = False,
    file: Annotated[Path, typer.Option(help="The committed ratios.")] = COMMITTED,
    only: Annotated[str, typer.Option(help="Only ratios whose name has this in it.")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; one is steadier beside other work.")] = 1,
) -> None:
    """Compare the ratios of this checkout with the committed ones; exit status 1 where one got worse."""
    torch.set_num_threads(threads)
    keep_memory()
    machine = bench.machine(torch.device("cpu"))
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"ratios": {}}
    chosen = {name: measure for name, measure in MEASURES.items() if only in name}
    verdicts = judge(chosen, {} if renew else known["ratios"])
    _show(verdicts)
    worse = [verdict for verdict in verdicts if verdict.worse]
    if renew:
        old = known["ratios"]
        new = {v.name: {"ratio": round(v.ratio, 3), "band": old.get(v.name, {}).get("band", BAND)} for v in verdicts}
        document = {"machine": machine, "threads": threads, "versions": bench.versions(), "ratios": {**old, **new}}
        text = json.dumps(document, indent=2) + "\n"
        files.write_file(file, text.encode(), what="ratios", error=DataError)
    same = known.get("machine") == machine and known.get("threads") == threads
    if not renew and not same:
        made = f"{known.get('machine')} with threads: {known.get('threads')}"
        console.print(f"The committed ratios are of {made}; nothing fails here.", soft_wrap=True)
    facts = [{"name": v.name, "ratio": round(v.ratio, 3), "committed": v.committed, "worse": v.worse} for v in verdicts]
    for verdict in worse:
        console.print(
            f"worse: {verdict.name} is {verdict.ratio:.2f} times as fast as PyTorch, committed {verdict.committed} "
            f"less at most {verdict.band:.0%}", markup=False, soft_wrap=True,
        )  # fmt: skip
    typer.echo(json.dumps({"machine": machine, "threads": threads, "comparable": same, "ratios": facts}))
    if worse and same:
        raise typer.Exit(1)


def _show(verdicts: list[Verdict]) -> None:
    table = Table("times as fast as PyTorch in bf16", "now", "committed", "at least", "")
    for v in verdicts:
        least = "–" if v.committed is None else f"{v.committed * (1 - v.band):.2f}"
        known = "–" if v.committed is None else f"{v.committed:.2f}"
        table.add_row(v.name, f"{v.ratio:.2f}", known, least, "worse" if v.worse else "")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
