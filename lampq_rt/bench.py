"""Latency of an integer model beside the floating-point ones that it replaces, in one process, taking turns.

On a machine that is not quite idle a latency moves by tens of percent from minute to minute; a ratio of two latencies
measured back to back hardly does. So the variants run in rounds (each once a round, for about `ROUND_SECONDS`), and the
speed-up is the median over the rounds of the ratio within one round. `torch.utils.benchmark.Timer` does the timing, in
inference mode, after warm-up. What "peak memory" means is said in `lampq_rt.memory`.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lampq_rt.compiler import compile as compile_plan
from lampq_rt.errors import BackendError, UnknownNameError
from lampq_rt.memory import PeakMemory, forget
from lampq_rt.models import weight_bytes
from lampq_rt.plan import Plan
from lampq_rt.registry import Registry
from lampq_rt.version import __version__

ROUNDS = 10
ROUND_SECONDS = 0.2

OURS = "lampq"
GROUPS = {"eager": ("fp32-eager", "bf16-eager"), "bf16": ("bf16-eager",), "compile": ("bf16-compile",)}
"""Short names that `--against` takes beside those of single variants."""

Progress = Callable[[str], None]
"""Told in a few words what happens now."""


@dataclass(frozen=True)
class Contender:
    """A variant, ready to run.

    Attributes:
        run: images [B, C, H, W] in `dtype` to logits.
        model: what holds its weights.
        dtype: of its input and of its arithmetic where that is not integer.
        label: what the table calls its arithmetic ("float32", "bfloat16", "int8").
    """

    run: Callable[[Tensor], Tensor]
    model: nn.Module
    dtype: torch.dtype
    label: str


class Builder(Protocol):
    """Makes a contender from the original model; `plan` is for those that quantise."""

    def __call__(self, original: nn.Module, plan: Plan, device: torch.device) -> Contender:
        """Build it.

        Raises:
            BackendError: this machine cannot run it; the message says why.
        """
        ...


VARIANTS: Registry[Builder] = Registry("bench variant")


@dataclass
class Result:
    """Rows as `lampq bench --json` writes them, and the variants that were left out, with the reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@VARIANTS.register("fp32-eager")
def _fp32_eager(original: nn.Module, plan: Plan, device: torch.device) -> Contender:
    model = copy.deepcopy(original).to(device)
    return Contender(model, model, torch.float32, "float32")


@VARIANTS.register("bf16-eager")
def _bf16_eager(original: nn.Module, plan: Plan, device: torch.device) -> Contender:
    model = copy.deepcopy(original).to(device, torch.bfloat16)
    return Contender(model, model, torch.bfloat16, "bfloat16")


@VARIANTS.register("bf16-compile")
def _bf16_compile(original: nn.Module, plan: Plan, device: torch.device) -> Contender:
    model = copy.deepcopy(original).to(device, torch.bfloat16)
    torch._dynamo.reset()
    compiled: Any
    if device.type == "cuda":
        compiled = torch.compile(model, mode="max-autotune")
    else:  # frozen: weights are constants. Threads: Inductor's cache would serve code built for another number of them
        compiled = torch.compile(model, options={"freezing": True, "cpp.threads": torch.get_num_threads()})

    def run(images: Tensor) -> Tensor:
        try:
            return compiled(images)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            text = next(line for line in f"{error}\nno reason given".splitlines() if line.strip())
            raise BackendError(f"torch.compile failed ({text[:160]})") from None

    return Contender(run, model, torch.bfloat16, "bfloat16")


@VARIANTS.register(OURS)
def _lampq(original: nn.Module, plan: Plan, device: torch.device) -> Contender:
    model = compile_plan(original, plan, device)
    return Contender(model, model, torch.float32, "int8")


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
        progress: told what happens now.

    Raises:
        BackendError: the device is not there, or has no integer kernels. (A baseline that cannot run is left out.)
        UnknownNameError: unknown variant.
        PlanError: the plan was made for other weights.
    """
    target, chosen, result = _device(device), variants(against), Result()
    for batch in batches:
        images = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            entrants = _entrants(original, plan, chosen, target, images, result, progress)
            times = _rounds(entrants, rounds, limit_seconds, partial(_tell, progress, batch))
        speedups = _speedups(times)
        for variant, entrant in entrants.items():
            row = _row(name or plan.model, batch, variant, entrant, target, times[variant])
            bits = round(plan.mean_bits, 4) if variant == OURS else None
            result.rows.append({**row, "rounds": len(times[variant]), "speedup": speedups[variant], "mean_bits": bits})
        del entrants
        forget()
    return result


def _tell(progress: Progress, batch: int, text: str) -> None:
    progress(f"batch {batch}: {text}")


@dataclass(frozen=True)
class _Entrant:
    contender: Contender
    images: Tensor
    peak_bytes: int | None


def _entrants(
    original: nn.Module,
    plan: Plan,
    chosen: Sequence[str],
    device: torch.device,
    images: Tensor,
    result: Result,
    progress: Progress,
) -> dict[str, _Entrant]:
    """Build and warm up every variant that this machine can run, and take its memory."""
    entrants: dict[str, _Entrant] = {}
    for variant in chosen:
        if variant in result.left_out:
            continue
        progress(f"batch {len(images)}: preparing {variant}")
        memory = PeakMemory(device)
        try:
            contender = VARIANTS.get(variant)(original, plan, device)
            sample = images.to(device, contender.dtype)
            for _ in range(3):
                contender.run(sample)
        except BackendError as error:
            if variant == OURS:
                raise
            result.left_out[variant] = str(error)
            continue
        with memory.peak():
            contender.run(sample)
        entrants[variant] = _Entrant(contender, sample, memory.peak_bytes)
    return entrants


def _rounds(
    entrants: dict[str, _Entrant], rounds: int, limit_seconds: float | None, progress: Progress
) -> dict[str, list[float]]:
    """Seconds per run, by variant and round."""
    started = time.perf_counter()
    timers, counts = {}, {}
    for variant, entrant in entrants.items():
        names = {"run": entrant.contender.run, "images": entrant.images}
        timers[variant] = Timer("run(images)", globals=names, num_threads=torch.get_num_threads())
        counts[variant] = max(1, round(ROUND_SECONDS / timers[variant].timeit(1).mean))
    times: dict[str, list[float]] = {variant: [] for variant in entrants}
    for done in range(rounds):
        if limit_seconds is not None and done >= 2 and time.perf_counter() - started > limit_seconds:
            break
        progress(f"round {done + 1} of {rounds}")
        for variant, timer in timers.items():
            times[variant].append(timer.timeit(counts[variant]).mean)
    return times


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
        "weight_bytes": weight_bytes(entrant.contender.model),
        "versions": versions(),
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


def versions() -> dict[str, str]:
    """Versions that a latency depends on."""
    return {
        "lampq_rt": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
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
