"""Ours beside what one would install instead: speed, memory, and the accuracy that the speed was bought with.

    python -m benchmarks.peers --data DIR --models deit_tiny_patch16_224,… --batch 1,8,32 --out docs/results.md

Speed: all variants of one model and batch size take turns in one process (`lampq_rt.bench`), random weights. Memory:
each variant in a process of its own. Accuracy: each INT8 on the same real images, calibrated on others, as many as
its makers' tool looks at; needs DIR with `weights/NAME.safetensors`, `calib1000/`, `imagenet_dev1000/` and its
`labels.csv`, and is left out without. Rows are kept in benchmarks/results/<machine>.jsonl as they are finished and
not measured again, so a run that was stopped (or by `--minutes`) goes on where it was. Packages that are not
installed are left out, with a line that says how to install them. A table for people, one line of JSON last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks import peer_tables
from benchmarks.harness import RESULTS, ROOT, Clock, Store, fresh_memory, rows_file
from benchmarks.markdown import put_between
from benchmarks.results import compare, evaluated
from lampq_rt import bench, images, peers
from lampq_rt.calibrate import Budget, calibrate
from lampq_rt.cli_common import names, numbers
from lampq_rt.errors import BackendError, DataError, LampqError
from lampq_rt.memory import keep_memory
from lampq_rt.models import load_model
from lampq_rt.plan import Plan
from lampq_rt.standin import stand_in_plan
from lampq_rt.variants import OURS, VARIANTS, Job

MODELS = "deit_tiny_patch16_224,deit_small_patch16_224,vit_base_patch16_224"
REAL_MODELS = ("deit_tiny_patch16_224", "vit_tiny_patch16_224")
"""Those with real weights in the data folder, for accuracy."""

AGAINST = "fp32-eager,bf16-eager,bf16-compile,peers"
PARTS = ("speed", "memory", "accuracy")
LEAST_SECONDS = 45.0
"""Nothing is started with less time left than this."""

SLOW_TO_BUILD = ("torchao-int8",)
"""Compiled anew for every batch size, which takes longer than all the timing; they take part at some sizes only."""

ACCURACY_KEY = ("kind", "model", "variant", "images", "calib_images")
console = Console(highlight=False)


def main(
    data: Annotated[Path | None, typer.Option(help="Real weights and images; without, no accuracy.")] = None,
    models: Annotated[str, typer.Option(help="timm names, for speed and memory.")] = MODELS,
    batch: Annotated[str, typer.Option(help="Batch sizes for speed.")] = "1,8,32",
    memory_batch: Annotated[str, typer.Option(help="Batch sizes for memory.")] = "8",
    slow_batch: Annotated[str, typer.Option(help="Batch sizes with torchao, which compiles long.")] = "8",
    against: Annotated[str, typer.Option(help="Variants or groups, as of `lampq bench`.")] = AGAINST,
    out: Annotated[Path | None, typer.Option(help="Markdown file with the markers; without, no file.")] = None,
    only: Annotated[str, typer.Option(help="Parts, of speed, memory, accuracy.")] = ",".join(PARTS),
    minutes: Annotated[float | None, typer.Option(help="Start nothing more after this.")] = None,
    seconds: Annotated[float, typer.Option(help="Timing of one model and batch, beside warm-up.")] = 15.0,
    rounds: Annotated[int, typer.Option(help="At most so many turns a variant.")] = 10,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default PyTorch's own number.")] = None,
    limit: Annotated[int, typer.Option(help="Evaluation images.")] = 1000,
    cache: Annotated[Path, typer.Option(help="Where peers' quantised models are kept.")] = ROOT / "build" / "peers",
    results: Annotated[Path, typer.Option(help="Folder of the rows.")] = RESULTS,
    again: Annotated[bool, typer.Option(help="Measure what there is already, too; old rows stay.")] = False,
) -> None:
    """Fill in the rows that are missing and write the tables."""
    try:
        parts, chosen = names(only), bench.variants(names(against))
        if set(parts) - set(PARTS):
            raise DataError(f"--only {only!r}: {', '.join(PARTS)} with commas between them are allowed")
        if threads is not None:
            torch.set_num_threads(threads)
        keep_memory()
        store, clock, left_out = Store(rows_file(folder=results)), Clock(minutes), dict(_not_installed(chosen))
        chosen = [variant for variant in chosen if variant not in left_out]
        if "accuracy" in parts and data is not None:
            measure_accuracy(store, clock, data, _integer(chosen), limit, cache, again, left_out)
        if "speed" in parts:
            slow = numbers(slow_batch, "--slow-batch")
            cells = {
                size: [variant for variant in chosen if variant not in SLOW_TO_BUILD or size in slow]
                for size in numbers(batch, "--batch")
            }
            measure_speed(store, clock, names(models), cells, rounds, seconds, cache, again)
        if "memory" in parts:
            sizes = numbers(memory_batch, "--memory-batch")
            measure_memory(store, clock, names(models), sizes, chosen, cache, again, left_out)
    except LampqError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for variant, reason in left_out.items():
        console.print(f"{variant} left out: {reason}", markup=False, soft_wrap=True)
    report(store, out)
    accuracy = Store(store.path, ACCURACY_KEY).latest(kind="accuracy")
    facts = {**{kind: store.latest(kind=kind) for kind in ("speed", "memory")}, "accuracy": accuracy}
    typer.echo(json.dumps({**facts, "left_out": left_out}))


def report(store: Store, out: Path | None) -> None:
    """Show the tables of all rows there are, and write them to the document."""
    accuracy = Store(store.path, ACCURACY_KEY)
    tables = {
        "peers-speed": list(peer_tables.speed(store.latest(kind="speed"))),
        "peers-memory": list(peer_tables.memory(store.latest(kind="memory"))),
        "peers-accuracy": list(peer_tables.accuracy(accuracy.latest(kind="accuracy"))),
    }
    for marker, lines in tables.items():
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        if out is not None and lines:
            put_between(out, marker, lines)


def measure_speed(
    store: Store,
    clock: Clock,
    models: list[str],
    cells: dict[int, list[str]],
    rounds: int,
    seconds: float,
    cache: Path,
    again: bool,
) -> None:
    """One run a model and batch size, with all its variants in it: a ratio across two runs would be worth little."""
    for model in models:
        missing = [batch for batch, chosen in cells.items() if again or _lacks(store, model, batch, chosen)]
        if not missing or clock.left() < LEAST_SECONDS:
            continue
        original, plan = _random(model)
        for batch in missing:
            if clock.left() < LEAST_SECONDS:
                break
            with console.status(f"{model}, batch {batch}") as status:
                found = bench.bench(
                    original, plan, batches=[batch], against=cells[batch], rounds=rounds,
                    limit_seconds=min(seconds, clock.left()), name=model, folder=cache,
                    input_size=tuple(original.pretrained_cfg["input_size"]),
                    progress=lambda text, status=status, model=model: status.update(f"{model}, {text}"),
                )  # fmt: skip
            store.append({"kind": "speed", **row} for row in found.rows)
            for variant, reason in found.left_out.items():
                console.print(f"{model}, batch {batch}: {variant} left out: {reason}", markup=False, soft_wrap=True)
            told = ", ".join(f"{row['variant']} {row['latency_ms']['median']:.4g}" for row in found.rows)
            console.print(f"{model}, batch {batch}, ms: {told}", soft_wrap=True)


def measure_memory(
    store: Store,
    clock: Clock,
    models: list[str],
    batches: list[int],
    chosen: list[str],
    cache: Path,
    again: bool,
    left_out: dict[str, str],
) -> None:
    """A process for each variant; peers' models are quantised here if they are not, since loading is what users do."""
    threads = torch.get_num_threads()
    for model in models:
        for batch in batches:
            done = {row["variant"] for row in store.latest(kind="memory", model=model, batch=batch, threads=threads)}
            for variant in (v for v in chosen if again or v not in done):
                if clock.left() < LEAST_SECONDS:
                    return
                try:
                    with console.status(f"{model}, batch {batch}: memory of {variant}"):
                        _quantise(model, variant, cache)
                        row = fresh_memory(model, batch, variant, threads, cache)
                except BackendError as error:
                    left_out[f"{variant} (memory)"] = str(error)
                    continue
                store.append([row])
                console.print(f"{model}, batch {batch}, {variant}: {(row['peak_memory_bytes'] or 0) / 1e6:.0f} MB")


def measure_accuracy(
    store: Store,
    clock: Clock,
    data: Path,
    chosen: list[str],
    limit: int,
    cache: Path,
    again: bool,
    left_out: dict[str, str],
) -> None:
    """Every INT8 on the same images, none of which it was calibrated on."""
    for model in REAL_MODELS:
        done = {row["variant"] for row in store.latest(kind="accuracy", model=model, images=limit)}
        missing = [variant for variant in chosen if again or variant not in done]
        if not missing or clock.left() < LEAST_SECONDS:
            continue
        original = load_model(model, data / "weights" / f"{model}.safetensors")
        with console.status(f"{model}: fp32 on {limit} images"):
            truth = evaluated(data, model, original, limit)
        for variant in missing:
            if clock.left() < LEAST_SECONDS:
                break
            count = peers.PEERS[variant].calibration_images if variant in peers.PEERS else 32
            try:
                with console.status(f"{model}: {variant}"):
                    run = _calibrated(variant, original, _calibration(data, model, count), cache)
                    found = compare(run, truth)
            except BackendError as error:
                left_out[f"{variant} (accuracy)"] = str(error)
                continue
            row = {
                "kind": "accuracy", "model": model, "variant": variant, "images": limit, "calib_images": count, **found,
                "versions": bench.versions(variant), "machine": bench.machine(torch.device("cpu")),
            }  # fmt: skip
            store.append([row])
            console.print(f"{model}, {variant}: {found}", markup=False)


def _calibrated(variant: str, original: nn.Module, seen: torch.Tensor, cache: Path) -> Callable[..., torch.Tensor]:
    """The variant in INT8, as its makers' defaults quantise it; ours with 8 bits everywhere."""
    plan = calibrate(original, seen).plan(Budget(mean_bits=8), "uniform") if variant == OURS else _no_plan(original)
    contender = VARIANTS.get(variant)(Job(original, plan, torch.device("cpu"), seen, cache))
    return lambda pixels: contender.run(pixels.to(contender.dtype)).float()


def _no_plan(original: nn.Module) -> Plan:
    """For variants that follow none."""
    return stand_in_plan(original, torch.zeros(1, *original.pretrained_cfg["input_size"]), 16)


def _calibration(data: Path, model: str, count: int) -> torch.Tensor:
    files = images.choose(images.list_images(data / "calib1000"), count, seed=0)
    return images.load_images(files, images.preprocessing(model))


def _random(model: str) -> tuple[nn.Module, Plan]:
    """The model with random weights, and W8A8 for it."""
    original = load_model(model, random=True)
    return original, stand_in_plan(original, torch.randn(1, *original.pretrained_cfg["input_size"]), 8)


def _quantise(model: str, variant: str, cache: Path) -> None:
    """Leave a peer's quantised model in the cache; where it is already, nothing but its loading happens."""
    if variant in peers.PEERS:
        original, plan = _random(model)
        size = tuple(original.pretrained_cfg["input_size"])
        VARIANTS.get(variant)(Job(original, plan, torch.device("cpu"), bench.random_calibration(size), cache))


def _lacks(store: Store, model: str, batch: int, chosen: list[str]) -> bool:
    rows = store.latest(kind="speed", model=model, batch=batch, threads=torch.get_num_threads())
    return bool(set(chosen) - {row["variant"] for row in rows})


def _integer(chosen: list[str]) -> list[str]:
    """Ours and the peers that quantise."""
    return [v for v in chosen if v == OURS or (v in peers.PEERS and not v.endswith(("bf16", "fp8")))]


def _not_installed(chosen: list[str]) -> Iterator[tuple[str, str]]:
    for variant in chosen:
        packages: tuple[Any, ...] = peers.PEERS[variant].packages if variant in peers.PEERS else ()
        missing = [package for package in packages if not peers.installed(package)]
        if missing:
            yield variant, f"{' and '.join(missing)} not installed; to have it: {peers.INSTALL}"


if __name__ == "__main__":
    typer.run(main)
