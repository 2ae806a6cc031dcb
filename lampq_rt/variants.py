"""What `lampq bench` can time: our integer model, PyTorch in floating point, and (`lampq_rt.peers`) other runtimes.

A variant is a builder, found by name. It gets a `Job` and gives a `Contender`: a callable from images to logits, with
what has to be known about it beside its speed. Nothing is imported or built before it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.compiler import CompiledModel
from lampq_rt.compiler import compile as compile_plan
from lampq_rt.errors import BackendError
from lampq_rt.models import weight_bytes
from lampq_rt.plan import Plan
from lampq_rt.registry import Registry

OURS = "lampq"


@dataclass(frozen=True)
class Job:
    """What a variant is built from.

    Attributes:
        original: the floating-point model, on the CPU; never changed.
        plan: made for its weights, for the variants that follow one.
        device: where it is to run.
        calibration: images [n, C, H, W] fp32 for the variants that calibrate themselves.
        folder: where these keep a quantised model for the next time.
    """

    original: nn.Module
    plan: Plan
    device: torch.device
    calibration: Tensor
    folder: Path


@dataclass(frozen=True)
class Contender:
    """A variant, ready to run.

    Attributes:
        run: images [B, C, H, W] in `dtype` to logits.
        model: what holds its weights; None where PyTorch does not hold them.
        dtype: of its input and of its arithmetic where that is not integer.
        label: what the table calls its arithmetic ("float32", "bfloat16", "int8").
        stored_bytes: size of its weights where `model` does not tell it.
    """

    run: Callable[[Tensor], Tensor]
    model: nn.Module | None
    dtype: torch.dtype
    label: str
    stored_bytes: int | None = None

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of its weights as they are stored; None where that is not known."""
        if self.stored_bytes is not None or self.model is None:
            return self.stored_bytes
        return weight_bytes(self.model)

    @property
    def served_bytes(self) -> int | None:
        """Bytes that serving holds of its weights, repacked copies among them; None where that is not known.

        To be asked after a run. Code that was compiled from `model` keeps copies that nobody counts.
        """
        if isinstance(self.model, CompiledModel):
            return self.model.served_bytes
        return self.weight_bytes if self.run is self.model else None


Builder = Callable[[Job], Contender]
"""Raises `BackendError` where this machine cannot run the variant; the message says why."""

VARIANTS: Registry[Builder] = Registry("bench variant")


@VARIANTS.register("fp32-eager")
def _fp32_eager(job: Job) -> Contender:
    model = copy.deepcopy(job.original).to(job.device)
    return Contender(model, model, torch.float32, "float32")


@VARIANTS.register("bf16-eager")
def _bf16_eager(job: Job) -> Contender:
    model = copy.deepcopy(job.original).to(job.device, torch.bfloat16)
    return Contender(model, model, torch.bfloat16, "bfloat16")


@VARIANTS.register("bf16-compile")
def _bf16_compile(job: Job) -> Contender:
    model = copy.deepcopy(job.original).to(job.device, torch.bfloat16)
    return Contender(compiled(model, job.device), model, torch.bfloat16, "bfloat16")


@VARIANTS.register(OURS)
def _lampq(job: Job) -> Contender:
    model = compile_plan(job.original, job.plan, job.device)
    return Contender(model, model, torch.float32, "int8")


def compiled(model: nn.Module, device: torch.device, **options: Any) -> Callable[[Tensor], Tensor]:
    """`torch.compile` at its best setting on that device, with more options of Inductor; compiles at its first call.

    On a GPU `max-autotune`; on a CPU with frozen weights (they are constants), and the number of threads among the
    options, since Inductor's cache would serve code built for another number of them.

    Returns:
        A function that raises `BackendError` where compiling failed.
    """
    best: dict[str, Any] = {"freezing": True, "cpp.threads": torch.get_num_threads()}
    if device.type == "cuda":
        best = torch._inductor.list_mode_options("max-autotune")
    fast: Any = torch.compile(model, options={**best, **options})

    def run(images: Tensor) -> Tensor:
        try:
            return fast(images)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            text = next(line for line in f"{error}\nno reason given".splitlines() if line.strip())
            raise BackendError(f"torch.compile failed ({text[:160]})") from None

    return run
