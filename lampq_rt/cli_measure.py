"""`lampq eval` and `lampq bench`: how right, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.table import Table

from lampq_rt.cli_common import (
    Images,
    Json,
    Labels,
    Model,
    Output,
    Threads,
    Weights,
    names,
    numbers,
    percent,
    plural,
    same_model,
    true_classes,
    use_threads,
)
from lampq_rt.errors import BackendError, DataError, LampqError

if TYPE_CHECKING:
    from torch import nn

    from lampq_rt.plan import Plan

BACKENDS = ("simulate", "cpu", "cuda", "reference")
BENCH_BITS = 8


def evaluate(
    model: Model,
    images: Images,
    weights: Weights = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="X.plan", help="Evaluate this plan.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="X.lampq", help="Evaluate this compiled model.")
    ] = None,
    labels: Labels = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", help="Only N images, evenly spaced over the sorted list.", min=1),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="simulate, cpu, cuda or reference; by default what compile would serve.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 32,
    json: Json = None,
) -> None:
    """Compare a quantised model with its original on the same images.

    Reports top-1 and top-5 (with labels), agreement with the original, and KL(original || quantised) in nats.

    With neither --plan nor --checkpoint: the original alone.

    With --checkpoint and no --weights there is nothing to compare with: top-1 and top-5 only.

    \b
    Examples:
      lampq eval deit_tiny_patch16_224 --weights deit_tiny.safetensors \\
          --plan deit_tiny.plan --images val --labels val/labels.csv
      lampq eval deit_tiny_patch16_224 --checkpoint deit_tiny.lampq \\
          --images val --labels val/labels.csv --json result.json
    """

    from lampq_rt import images as pictures
    from lampq_rt.evaluate import evaluate as measure
    from lampq_rt.models import check_name, load_model

    output = Output(json)
    check_name(model)
    _check_choices(plan, checkpoint, backend, weights, labels)
    files = pictures.list_images(images)
    preprocess = pictures.preprocessing(model)
    original = None if checkpoint is not None and weights is None else load_model(model, weights)
    ours = _candidate(model, original, plan, checkpoint, backend)
    if backend == "cuda" and original is not None:
        original = original.to(backend)
    chosen = pictures.spread(files, limit)
    truth = true_classes(labels, images, files, chosen, original if original is not None else ours)
    batches = pictures.batches(chosen, preprocess, batch)
    found = measure(ours, original, output.track(batches, len(chosen), "evaluating"), truth)
    facts = {"model": model, **found.to_json()}
    output.show(_table(facts, "fp32 alone" if ours is original else str(plan or checkpoint)))
    output.facts(facts)


def bench(
    model: Model,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Weights as safetensors; by default random ones, with --plan timm's pretrained ones.",
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", metavar="X.plan", help="Bench this plan.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help=f"Without --plan: every layer at this width, {BENCH_BITS} by default.", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes.")] = "1,8",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="eager (fp32 and bf16), bf16, compile, openvino, onnxruntime, torchao, peers (these three), or "
            "names of variants.",
        ),
    ] = "eager,compile",
    rounds: Annotated[int, typer.Option(help="How often each variant's turn comes.", min=1)] = 10,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure latency and memory beside floating point, all variants taking turns in one process.

    Without --plan and --weights the weights are random: latency does not depend on them.

    \b
    Examples:
      lampq bench deit_small_patch16_224 --batch 1,8
      lampq bench vit_base_patch16_224 --weights vit_base.safetensors \\
          --plan vit_base.plan --against eager,compile --threads 2
      lampq bench deit_tiny_patch16_224 --against openvino,onnxruntime
    """
    from lampq_rt import backends
    from lampq_rt import bench as benchmark
    from lampq_rt.images import preprocessing
    from lampq_rt.memory import keep_memory
    from lampq_rt.models import check_name

    output = Output(json)
    check_name(model)
    sizes, rivals = numbers(batch, "--batch"), names(against)
    benchmark.variants(rivals)
    backends.resolve(device)
    _check_bits(bits, plan)
    use_threads(threads)
    keep_memory()
    size = tuple(preprocessing(model).config["input_size"])
    with output.working(f"building {model}") as say:
        network, decided = _contender(model, weights, plan, bits or BENCH_BITS, size, say)
        result = benchmark.bench(
            network,
            decided,
            batches=sizes,
            against=rivals,
            device=device,
            rounds=rounds,
            name=model,
            input_size=size,
            progress=say,
        )
    output.show(bench_table(result.rows, model), *_conclusions(result.rows))
    for variant, reason in result.left_out.items():
        output.note(f"{variant} left out: {reason}")
    output.facts(result.rows)


def _check_bits(bits: int | None, plan: Path | None) -> None:
    """Refuse a width that no kernels have, or one beside a plan, which has its own."""
    from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS

    if bits is not None and plan is not None:
        raise LampqError("--bits and --plan exclude each other: a plan has widths of its own")
    if bits is not None and bits not in (*INTEGER_BITS, FLOAT_BITS):
        raise DataError(f"--bits {bits}; allowed: {INTEGER_BITS[0]} to {INTEGER_BITS[-1]}, or {FLOAT_BITS}")


def _contender(
    model: str, weights: Path | None, plan: Path | None, bits: int, size: tuple[int, ...], say: Callable[[str], None]
) -> tuple[nn.Module, Plan]:
    """The model to bench, and its plan: the one on disk, or a stand-in of that width everywhere."""
    import torch

    from lampq_rt.models import load_model
    from lampq_rt.plan import Plan
    from lampq_rt.standin import stand_in_plan

    if plan is not None:
        decided = Plan.load(plan)
        same_model(decided.model, model, plan)
        return load_model(model, weights), decided
    network = load_model(model, weights, random=True)
    say("ranges of one forward pass")
    return network, stand_in_plan(network, torch.randn(2, *size), bits)


def bench_table(rows: Sequence[dict[str, Any]], title: str) -> Group:
    """Rows of `lampq_rt.bench` as a table."""
    from lampq_rt.inspect_plan import size, titled

    machine = f"{rows[0]['machine']}, {plural(rows[0]['threads'], 'thread')}" if rows else ""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("batch", "variant", "ms", "p20–p80", "img/s", "×", "weights", "peak"):
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        latency = row["latency_ms"]
        table.add_row(
            str(row["batch"]),
            row["variant"],
            _three(latency["median"]),
            f"{_three(latency['p20'])}–{_three(latency['p80'])}",
            _three(row["images_per_s"]),
            "–" if row["speedup"] is None else f"{row['speedup']:.2f}",
            size(row["weight_bytes"]),
            size(row["peak_memory_bytes"]),
            style="bold" if row["variant"] == "lampq" else None,
            end_section=row["variant"] == "lampq",
        )
    table.caption = "ms: median; ×: times as fast as the fastest rival; peak: memory of a forward pass with its weights"
    table.caption_justify = "left"
    return titled(f"{title} on {machine}", table)


def _three(value: float) -> str:
    """Three significant digits, all of a larger number's integer part."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _conclusions(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"batch {row['batch']}: lampq is {row['speedup']:.2f} times as fast as the fastest of the others."
        for row in rows
        if row["variant"] == "lampq" and row["speedup"] is not None
    ]


def _check_choices(
    plan: Path | None, checkpoint: Path | None, backend: str | None, weights: Path | None, labels: Path | None
) -> None:
    """Refuse combinations that cannot be meant, and a device that is not there, before the model is read."""
    from lampq_rt.backends import resolve

    if backend is not None and backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend in ("cpu", "cuda"):
        resolve(backend)
    if plan is not None and checkpoint is not None:
        raise LampqError("--plan and --checkpoint exclude each other")
    if checkpoint is not None and backend in ("simulate", "reference"):
        raise BackendError(f"--backend {backend} needs --plan: a checkpoint holds integer weights only")
    if checkpoint is not None and weights is None and labels is None:
        raise DataError("nothing to compare the checkpoint with: give --labels, or the original's --weights, or both")


def _candidate(
    model: str, original: nn.Module | None, plan: Path | None, checkpoint: Path | None, backend: str | None
) -> nn.Module:
    """The model in question, ready to run."""
    import lampq_rt
    from lampq_rt.simulate import simulate

    device = backend if backend in ("cpu", "cuda") else None
    if checkpoint is not None:
        loaded = lampq_rt.load(checkpoint, device=device)
        same_model(loaded.plan.model, model, checkpoint)
        if original is not None:
            loaded.plan.check_weights(original)
        return loaded
    assert original is not None
    if plan is None:
        return original
    decided = lampq_rt.Plan.load(plan)
    same_model(decided.model, model, plan)
    if backend == "simulate":
        return simulate(original, decided)
    kernels = "reference" if backend == "reference" else "native"
    return lampq_rt.compile(original, decided, device, backend=kernels)


def _table(facts: dict[str, Any], what: str) -> Group:
    from lampq_rt.inspect_plan import titled

    table = Table()
    for column in ("", "top-1 %", "top-5 %", "agreement %", "KL (nats)"):
        table.add_column(column, justify="left" if not column else "right")
    kl = "–" if facts["kl"] is None else f"{facts['kl']:.4f}"
    if facts["agreement"] is not None:
        table.add_row("fp32", percent(facts["fp32_top1"]), percent(facts["fp32_top5"]), "", "")
    if what != "fp32 alone":
        table.add_row("quantised", percent(facts["top1"]), percent(facts["top5"]), percent(facts["agreement"]), kl)
    return titled(f"{facts['model']}: {what}, {facts['images']} images in {facts['seconds']:.1f} s", table)
