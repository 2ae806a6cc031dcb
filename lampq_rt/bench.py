"""Latency of an integer model beside the floating-point ones that it replaces, in one process, taking turns.

On a machine that is not quite idle a latency moves by tens of percent from minute to minute; a ratio of two latencies
measured back to back hardly does. So the variants run in rounds (each once a round, for about `ROUND_SECONDS`), and the
speed-up is the median over the rounds of the ratio within one round. `torch.utils.benchmark.Timer` does the timing, in
inference mode, after warm-up; on a GPU it is `triton.testing.do_bench`, which empties the L2 cache between calls. The
input changes from call to call, so that none finds it in a cache. What "peak memory" means is said in
`lampq_rt.memory`; what can be timed, in `lampq_rt.variants` and `lampq_rt.peers`.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lampq_rt import peers
from lampq_rt.errors import BackendError, UnknownNameError
from lampq_rt.memory import PeakMemory, forget
from lampq_rt.plan import Plan
from lampq_rt.variants import OURS, VARIANTS, Contender, Job
from lampq_rt.version import __version__

ROUNDS = 10
ROUND_SECONDS = 0.2
WARM_UP_RUNS = 3
WARM_UP_SECONDS = 2.0
"""After that, a variant too slow for all its runs is warm: what one run costs it no longer shows in the second."""

ROTATED_BYTES = 64 << 20
"""Different inputs take turns up to this size together, at least two and at most 16."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "eager": ("fp32-eager", "bf16-eager"),
    "bf16": ("bf16-eager",),
    "compile": ("bf16-compile",),
    **peers.GROUPS,
}
"""Short names that `--against` takes beside those of single variants."""

Progress = Callable[[str], None]
"""Told in a few words what happens now."""


@dataclass
class Result:
    """Rows as `lampq bench --json` writes them, and the variants that were left out, with the reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def variants(names: Sequence[str]) -> list[str]:
    """The baselines that `--against` names, in the order of naming, each once, and ours last.

    Raises:
        UnknownNameError: no variant or group has that name.
    """
    chosen: dict[str, None] = {}
    for name in names:
        for variant in GROUPS.get(name, (name,)):
            if variant not in VARIANTS.names():
                known = ", ".join([*GROUPS, *VARIANTS.names()])
                raise UnknownNameError(f"unknown variant {name!r} to bench against; known: {known}")
            chosen[variant] = None
    chosen.pop(OURS, None)
    return [*chosen, OURS]


def bench(
    original: nn.Module,
    plan: Plan,
    *,
    batches: Sequence[int],
    against: Sequence[str] = ("eager", "compile"),
    device: str | torch.device = "cpu",
    rounds: int = ROUNDS,
    limit_seconds: float | None = None,
    name: str | None = None,
    input_size: tuple[int, int, int] = (3, 224, 224),
    calibration: Tensor | None = None,
    folder: Path | None = None,
    progress: Progress = lambda text: None,
) -> Result:
    """Measure the integer model of `plan` and its rivals at each batch size.

    Args:
        original: the floating-point model, on the CPU; not changed.
        plan: made for its weights.
        batches: batch sizes.
        against: names of variants, or of groups of them (`GROUPS`).
        device: where all of them run.
        rounds: how often each variant's turn comes; more are steadier.
        limit_seconds: per batch size; once it is over, the round under way is the last (there are at least two).
        name: what the rows call the model; the plan's name of it by default.
        input_size: channels, height and width of the random images.
        calibration: images [n, C, H, W] for peers that quantise by themselves; four random ones by default, since
            their latency does not depend on their steps.
        folder: where these peers keep their quantised models from one call to the next; by default nowhere.
        progress: told what happens now.

    Raises:
        BackendError: the device is not there, or has no integer kernels. (A baseline that cannot run is left out.)
        UnknownNameError: unknown variant.
        PlanError: the plan was made for other weights.
    """
    target, chosen, result = _device(device), variants(against), Result()
    seen = random_calibration(input_size) if calibration is None else calibration
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(original, plan, target, seen, folder or Path(scratch))
        for batch in batches:
            inputs = _inputs((batch, *input_size))
            torch._dynamo.reset()  # here and not by each that compiles: it would forget what another has compiled
            with torch.inference_mode():
                entrants = _entrants(job, chosen, inputs, result, progress)
                times = _rounds(entrants, rounds, limit_seconds, partial(_tell, progress, batch))
            speedups = _speedups(times)
            for variant, entrant in entrants.items():
                row = _row(name or plan.model, batch, variant, entrant, target, times[variant])
                bits = round(plan.mean_bits, 4) if variant == OURS else None
                row |= {"rounds": len(times[variant]), "speedup": speedups[variant], "mean_bits": bits}
                result.rows.append(row)
            del entrants
            forget()
    return result


def random_calibration(input_size: tuple[int, int, int]) -> Tensor:
    """Four images [4, C, H, W] to quantise a model with whose latency or memory is measured, always the same."""
    return torch.randn(4, *input_size, generator=torch.Generator().manual_seed(1))


def _inputs(shape: tuple[int, ...]) -> list[Tensor]:
    """Different random images, as many as together outgrow a cache."""
    generator = torch.Generator().manual_seed(0)
    count = min(16, max(2, ROTATED_BYTES // (4 * torch.Size(shape).numel())))
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def _tell(progress: Progress, batch: int, text: str) -> None:
    progress(f"batch {batch}: {text}")


@dataclass(frozen=True)
class _Entrant:
    contender: Contender
    inputs: list[Tensor]
    peak_bytes: int | None
    seconds: float


def _entrants(
    job: Job, chosen: Sequence[str], images: Sequence[Tensor], result: Result, progress: Progress
) -> dict[str, _Entrant]:
    """Build and warm up every variant that this machine can run, and take its memory."""
    entrants: dict[str, _Entrant] = {}
    inputs: dict[torch.dtype, list[Tensor]] = {}  # shared: what one variant's memory holds must not be another's
    for dtype in (torch.float32, torch.bfloat16):
        inputs[dtype] = [sample.to(job.device, dtype) for sample in images]
    for variant in chosen:
        if variant in result.left_out:
            continue
        progress(f"batch {len(images[0])}: preparing {variant}")
        memory = PeakMemory(job.device)
        try:
            contender = VARIANTS.get(variant)(job)
            samples = inputs.get(contender.dtype) or [sample.to(job.device, contender.dtype) for sample in images]
            warm_up(contender, samples)
        except BackendError as error:
            if variant == OURS:
                raise
            result.left_out[variant] = str(error)
            continue
        with memory.peak():
            start = time.perf_counter()
            contender.run(samples[0])
            seconds = time.perf_counter() - start
        entrants[variant] = _Entrant(contender, samples, memory.peak_bytes, seconds)
    return entrants


def warm_up(contender: Contender, inputs: Sequence[Tensor]) -> None:
    """Run it `WARM_UP_RUNS` times, or until `WARM_UP_SECONDS` have passed; the first run may compile."""
    contender.run(inputs[0])
    start = time.perf_counter()
    for run in range(1, WARM_UP_RUNS):
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break
        contender.run(inputs[run % len(inputs)])


def _rounds(
    entrants: dict[str, _Entrant], rounds: int, limit_seconds: float | None, progress: Progress
) -> dict[str, list[float]]:
    """Seconds per run, by variant and round."""
    started = time.perf_counter()
    turns = {variant: _turn(entrant) for variant, entrant in entrants.items()}
    times: dict[str, list[float]] = {variant: [] for variant in entrants}
    for done in range(rounds):
        if limit_seconds is not None and done >= 2 and time.perf_counter() - started > limit_seconds:
            break
        progress(f"round {done + 1} of {rounds}")
        for variant, turn in turns.items():
            times[variant].append(turn())
    return times


def _turn(entrant: _Entrant) -> Callable[[], float]:
    """A function that runs it for about `ROUND_SECONDS` and tells the seconds of one run."""
    inputs, run = cycle(entrant.inputs), entrant.contender.run
    if entrant.inputs[0].is_cuda:
        from triton.testing import do_bench

        milliseconds = 1e3 * ROUND_SECONDS
        return lambda: do_bench(lambda: run(next(inputs)), warmup=0, rep=milliseconds, return_mode="median") / 1e3
    names = {"run": run, "inputs": inputs}
    timer = Timer("run(next(inputs))", globals=names, num_threads=torch.get_num_threads())
    count = max(1, round(ROUND_SECONDS / entrant.seconds))
    return lambda: timer.timeit(count).mean


def _speedups(times: dict[str, list[float]]) -> dict[str, float | None]:
    """How many times as fast as the fastest baseline each variant is: the median of the rounds' ratios."""
    baselines = [variant for variant in times if variant != OURS]
    if not baselines:
        return dict.fromkeys(times)
    best = times[min(baselines, key=lambda variant: statistics.median(times[variant]))]
    return {
        variant: round(statistics.median(b / own for b, own in zip(best, seconds, strict=True)), 4)
        for variant, seconds in times.items()
    }


def _row(
    name: str, batch: int, variant: str, entrant: _Entrant, device: torch.device, seconds: Sequence[float]
) -> dict[str, Any]:
    p20, median, p80 = (float(q) for q in torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])) * 1e3)
    return {
        "model": name,
        "batch": batch,
        "variant": variant,
        "device": device.type,
        "dtype": entrant.contender.label,
        "latency_ms": {"p20": round(p20, 4), "median": round(median, 4), "p80": round(p80, 4)},
        "images_per_s": round(batch * 1e3 / median, 2),
        "peak_memory_bytes": entrant.peak_bytes,
        "weight_bytes": entrant.contender.weight_bytes,
        "served_bytes": entrant.contender.served_bytes,
        "versions": versions(variant),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
    }


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise BackendError(f"unknown device {str(device)!r}; allowed: cpu, cuda") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BackendError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU on this machine; allowed: cpu")
    return chosen


def versions(variant: str = OURS) -> dict[str, str]:
    """Versions that a latency depends on, those of a peer's packages among them."""
    return {
        "lampq_rt": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
        **peers.versions(variant),
    }


def machine(device: torch.device) -> str:
    """The processor's name and number of cores, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {os.cpu_count()} cores"
