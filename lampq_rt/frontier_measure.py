"""One point of a sweep (`lampq_rt.frontier`): compile a plan, weigh it, evaluate it, time it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lampq_rt.bench import bench
from lampq_rt.compiler import compile as compile_plan
from lampq_rt.evaluate import evaluate, kl_divergence
from lampq_rt.frontier import PLANS, Point, standard_error
from lampq_rt.plan import Plan

LATENCY_ROUNDS = 5

PACKED_BITS = 4
"""Codes of at most so many bits lie two to a byte on a GPU (docs/numerics.md)."""

SOFTMAX_LETTERS = {"log2": "l", "cubic": "c"}
"""Schemes of softmax output that run other instructions than "rowmax", for `latency_class`."""

LatencyOf = Callable[[Plan], float]
"""Milliseconds of a plan; measured here (`MeasuredLatency`), or predicted from a table."""


class Recorded(nn.Module):
    """A model that runs once over the images and from then on repeats its answers, batch by batch in the same order.

    Args:
        model: left where it is; a copy runs where `device` is another.
        device: where it runs; images come from the CPU and logits go there.
    """

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.original, self.device = model, device
        self.model = model if device == "cpu" else copy.deepcopy(model).to(device)
        self.answers: list[Tensor] = []
        self.position: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits fp32 [B, classes], on the CPU."""
        if self.position is None:
            self.answers.append(self.model(images.to(self.device)).float().cpu())
            return self.answers[-1]
        self.position += 1
        return self.answers[self.position - 1]

    def record(self, batches: Iterable[Tensor]) -> None:
        """Run over the images now, before work that is lost where one of them cannot be read."""
        with torch.inference_mode():
            for images in batches:
                self(images)
        self.rewind()

    def rewind(self) -> None:
        """The next batch is the first again."""
        self.position = 0

    @property
    def logits(self) -> Tensor:
        """fp32 [images, classes] of the whole pass, on the CPU."""
        return torch.cat(self.answers)


def measure(
    plan: Plan,
    original: Recorded,
    batches: Iterable[Tensor],
    labels: Tensor | None,
    asked_bits: float,
    seconds: float,
    scratch: Path,
    device: str,
) -> tuple[Point, Tensor]:
    """Compile a plan, weigh its checkpoint and evaluate it; latency is left open.

    Args:
        plan: made for the weights of `original`.
        original: the floating-point model; runs here if it has not yet.
        batches: the evaluation images, the same each time.
        labels: int64 [images], or None.
        asked_bits: the plan's budget.
        seconds: that the plan took.
        scratch: a folder for the checkpoint, whose size counts; it is removed again.
        device: where the compiled model runs.

    Returns:
        The point, and KL of each image in nats, fp64 [images].
    """
    fast = compile_plan(original.original, plan, device)
    checkpoint = scratch / "checkpoint.tmp"
    try:
        fast.save(checkpoint)
        disk = checkpoint.stat().st_size
    finally:
        checkpoint.unlink(missing_ok=True)
    ours = Recorded(fast, device)
    found = evaluate(ours, original, batches, labels)
    original.rewind()
    kl = kl_divergence(original.logits, ours.logits)
    assert found.agreement is not None and found.kl is not None
    recipe = plan.provenance["recipe"]["name"]
    point = Point(
        recipe=recipe,
        asked_bits=asked_bits,
        mean_bits=round(plan.mean_bits, 6),
        disk_bytes=disk,
        weight_bytes=fast.weight_bytes,
        latency_ms=None,
        images=found.images,
        top1=found.top1,
        fp32_top1=found.fp32_top1,
        agreement=found.agreement,
        kl=found.kl,
        kl_error=standard_error(kl),
        divergence=_divergence(plan),
        seconds=round(seconds, 3),
        plan=f"{PLANS}/{recipe}-{asked_bits:g}.plan",
    )
    return point, kl


def _divergence(plan: Plan) -> float | None:
    """Of the plan as it was kept: after the iterative update, or of the proposal that won."""
    refined = plan.provenance.get("refine")
    if refined:
        return float(refined["divergence"][1])
    found = [p["divergence"] for p in plan.provenance.get("proposals", ()) if p["divergence"] is not None]
    return min(found, default=None)


class MeasuredLatency:
    """`LatencyOf` by `lampq_rt.bench`, once for all plans that run the same kernels.

    Args:
        network: the floating-point model.
        device: "cpu" or "cuda".
        batch: images at once.
        input_size: channels, height and width.
    """

    def __init__(self, network: nn.Module, device: str, batch: int, input_size: tuple[int, int, int]) -> None:
        self.network, self.device, self.batch, self.input_size = network, device, batch, input_size
        self.known: dict[str, float] = {}

    def know(self, plan: Plan, latency_ms: float) -> None:
        """Take over what an earlier run measured of a plan of the same class."""
        self.known[latency_class(plan, self.device)] = latency_ms

    def __call__(self, plan: Plan) -> float:
        """Median milliseconds of a batch."""
        key = latency_class(plan, self.device)
        if key not in self.known:
            result = bench(
                self.network,
                plan,
                batches=[self.batch],
                against=(),
                device=self.device,
                rounds=LATENCY_ROUNDS,
                input_size=self.input_size,
            )
            self.known[key] = float(result.rows[-1]["latency_ms"]["median"])
        return self.known[key]


def latency_class(plan: Plan, device: str) -> str:
    """Equal for plans that run the same kernels on tensors of the same containers.

    A CPU computes with int8 whatever the width, so only floating point differs; a GPU reads widths of up to 4 bits
    packed.
    """
    letters = []
    for params in plan.sites.values():
        for _, fmt in sorted(params.formats.items()):
            narrow = fmt.bits <= PACKED_BITS and device != "cpu"
            letters.append("f" if fmt.is_float else SOFTMAX_LETTERS.get(fmt.scheme, "4" if narrow else "8"))
    return "".join(letters)
