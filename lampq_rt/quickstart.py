"""The whole job in miniature, on what the package brings along: calibrate, compile, compare, measure.

A small Vision Transformer reads handwritten digits. It is quantised plainly, with the same bits everywhere, and by the
default recipe, which chooses bits of weights at the same mean width; both run as integer models on images that neither
training nor calibration has seen.
Latency is shown on a DeiT-Small with random weights, since a model as small as the first one says nothing about speed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from lampq_rt.bench import Result, bench
from lampq_rt.compiler import compile as compile_plan
from lampq_rt.digits import load_digits, load_digits_model
from lampq_rt.evaluate import Evaluation, evaluate
from lampq_rt.inspect_plan import bits_table, size, titled
from lampq_rt.memory import keep_memory
from lampq_rt.models import load_model, weight_bytes
from lampq_rt.plan import Plan
from lampq_rt.standin import stand_in_plan

OURS = "lampq+w"
"""The recipe that is used where nobody names one."""

WIDTHS = ((8, ("uniform",)), (4, ("uniform", OURS)), (3, ("uniform", OURS)))
"""Mean bits, and the recipes tried at each: at 8 bits there is nothing to choose."""

CALIBRATION_IMAGES = 100
LATENCY_MODEL = "deit_small_patch16_224"
LATENCY_BATCHES = (1, 8)
LATENCY_ROUNDS = 5

LATENCY_SECONDS = 15.0
"""Per batch size, once everything is compiled."""

BUSY_SECONDS = 45.0
"""A machine that needs longer for the digits would compile for minutes (2 cores at half of their usual speed: 51)."""

NEXT_STEPS = """
[bold]For your own model[/bold] (any timm Vision Transformer; weights as safetensors, a folder of images):

  lampq calibrate MODEL --weights FILE --images DIR \\
      --mean-bits 4 --recipe fast+w --out X.plan
  lampq inspect   X.plan --plot bits.png
  lampq eval      MODEL --weights FILE --plan X.plan --images DIR [--labels CSV]
  lampq compile   MODEL --weights FILE --plan X.plan --out X.lampq
  lampq bench     MODEL --weights FILE --plan X.plan --batch 1,8

MODEL is a name like deit_tiny_patch16_224; without --weights, timm's pretrained weights are fetched.
"""

Say = Callable[[str], None]


class Planner(Protocol):
    """A calibration that plans can be asked of (`lampq_rt.calibrate.Calibration`)."""

    def plan(self, budget: Any, recipe: str = ...) -> Plan:
        """The plan of that recipe under that budget."""
        ...


@dataclass(frozen=True)
class Row:
    """One way of quantising the digits model.

    Attributes:
        recipe: what chose the bits.
        bits: mean width asked for.
        plan: the choice.
        found: accuracy on the test images, on the integer runtime.
        memory_bytes: of the compiled model's tensors.
        disk_bytes: of its checkpoint.
    """

    recipe: str
    bits: int
    plan: Plan
    found: Evaluation
    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `seconds` for calibration alone."""

    rows: tuple[Row, ...]
    fp32: Evaluation
    fp32_bytes: int
    seconds: float


def compare(calibrate: Callable[..., Planner], budget: Callable[[int], Any], say: Say) -> Comparison:
    """Quantise the digits model in every way of `WIDTHS` and evaluate each on the test images.

    Args:
        calibrate: `lampq_rt.calibrate.calibrate`; handed in, since only commands may import the calibrator.
        budget: mean bits to a budget.
        say: told what happens now.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and lose much on a busy machine
    try:
        return _compare(calibrate, budget, say)
    finally:
        torch.set_num_threads(threads)


def _compare(calibrate: Callable[..., Planner], budget: Callable[[int], Any], say: Say) -> Comparison:
    model = load_digits_model()
    images, labels = load_digits("calibration")
    say("calibrating the digits model")
    started = time.perf_counter()
    calibration = calibrate(model, images[:CALIBRATION_IMAGES], labels=labels[:CALIBRATION_IMAGES], model_name="digits")
    plans = [(bits, r, calibration.plan(budget(bits), r)) for bits, recipes in WIDTHS for r in recipes]
    seconds = time.perf_counter() - started
    test_images, test_labels = load_digits("test")
    rows = []
    for bits, recipe, plan in plans:
        say(f"evaluating {recipe} at {bits} bits")
        rows.append(_row(model, recipe, bits, plan, test_images, test_labels))
    fp32 = evaluate(model, model, test_images.split(128), test_labels)
    return Comparison(tuple(rows), fp32, weight_bytes(model), seconds)


def is_busy(comparison: Comparison) -> bool:
    """True where this machine has so much else to do that two minutes would not be enough for `torch.compile` too."""
    waiting = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return comparison.seconds > BUSY_SECONDS or waiting > 1.5 * (os.cpu_count() or 1)


def latency(say: Say, *, busy: bool = False) -> Result:
    """Integer against floating point on a DeiT-Small with random weights; without `torch.compile` where `busy`."""
    keep_memory()
    model = load_model(LATENCY_MODEL, random=True)
    plan = stand_in_plan(model, torch.randn(1, 3, 224, 224), 8)
    result = bench(
        model,
        plan,
        batches=LATENCY_BATCHES,
        against=("eager",) if busy else ("eager", "compile"),
        rounds=LATENCY_ROUNDS,
        limit_seconds=LATENCY_SECONDS,
        name=LATENCY_MODEL,
        progress=say,
    )
    if busy:
        result.left_out["bf16-compile"] = "this machine is busy, compiling would take minutes (lampq bench does it)"
    return result


def comparison_tables(comparison: Comparison) -> Sequence[RenderableType]:
    """Accuracy and bytes of every way, and the bits that LampQ chose at the narrowest width.

    W/A: mean widths of the blocks' weights and activations. A terminal of 80 columns shows the table whole.
    """
    images = comparison.fp32.images
    table = Table()
    table.add_column("chosen by")
    for column in ("bits W/A", "top-1 %", "agreement %", "KL", "on disk", "in memory"):
        table.add_column(column, justify="right")
    full = size(comparison.fp32_bytes)
    table.add_row("(fp32)", "32/32", f"{comparison.fp32.top1:.2f}", "", "", full, full, end_section=True)
    for index, row in enumerate(comparison.rows):
        last = index + 1 == len(comparison.rows) or comparison.rows[index + 1].bits != row.bits
        table.add_row(
            row.recipe,
            f"{row.plan.mean_bits:.2f}/{row.plan.provenance['costs']['mean_activation_bits']:.2f}",
            f"{row.found.top1:.2f}",
            f"{row.found.agreement:.2f}",
            f"{row.found.kl:.4f}",
            size(row.disk_bytes),
            size(row.memory_bytes),
            style="bold" if row.recipe == OURS else None,
            end_section=last,
        )
    effort = f"{len(comparison.rows)} plans from {CALIBRATION_IMAGES} images in {comparison.seconds:.1f} s"
    title = f"Handwritten digits, {images} unseen images, on the integer runtime ({effort})"
    narrow = comparison.rows[-1].plan
    return titled(title, table), bits_table(narrow, f"LampQ's bits per layer at mean {narrow.mean_bits:.2f}")


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "model": "digits",
        "images": comparison.fp32.images,
        "fp32_top1": comparison.fp32.top1,
        "fp32_bytes": comparison.fp32_bytes,
        "calibration_seconds": round(comparison.seconds, 3),
        "plans": [
            {
                "recipe": row.recipe,
                "mean_bits": round(row.plan.mean_bits, 6),
                "top1": row.found.top1,
                "agreement": row.found.agreement,
                "kl": row.found.kl,
                "disk_bytes": row.disk_bytes,
                "weight_bytes": row.memory_bytes,
                "bits": {name: params.bits for name, params in row.plan.sites.items()},
            }
            for row in comparison.rows
        ],
    }


def _row(model: nn.Module, recipe: str, bits: int, plan: Plan, images: Tensor, labels: Tensor) -> Row:
    fast = compile_plan(model, plan)
    found = evaluate(fast, model, images.split(128), labels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.lampq"
        fast.save(path)
        return Row(recipe, bits, plan, found, fast.weight_bytes, path.stat().st_size)
