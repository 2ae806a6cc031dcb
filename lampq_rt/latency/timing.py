"""The time of one op call, with the caches as a model leaves them.

A layer's weights are read once a forward pass and then not again until all other layers' have been: so a call is timed
over as many copies of its weights as a whole model holds of weights, one after the other. What it reads of activations
was written just before, and stays the same buffer. Values are random: clocks and branches see what a model gives them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lampq_rt.errors import BackendError
from lampq_rt.latency.calls import Call, TensorSpec

CALL_SECONDS = 0.15
"""Time given to one call, after warm-up; it is repeated at least `LEAST_REPEATS` times over all copies."""

LEAST_REPEATS = 3
MOST_COPIES = 96
CODE_STEP = 1e-4
"""Step of random products of codes: logits and residuals of ordinary size come out."""


def time_call(call: Call, device: torch.device, footprint_bytes: int, seconds: float | None = None) -> float:
    """Median milliseconds of one such call.

    Args:
        call: what to run, on random data.
        device: where.
        footprint_bytes: bytes of all weights of the model that makes the call.
        seconds: how long to repeat it; `CALL_SECONDS` by default.
    """
    own = call.weight_bytes
    copies = min(MOST_COPIES, max(1, -(-footprint_bytes // own))) if own else 1
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        activations = {name: _fill(name, v, device, generator) for name, v in call.args if not _is_weight(v)}
        sets = [_arguments(call, activations, device, generator) for _ in range(copies)]
        function = _function(call.op)

        def run() -> None:
            for positional, keywords in sets:
                function(*positional, **keywords)

        run()  # repacks weights
        seconds = CALL_SECONDS if seconds is None else seconds
        return (_time_cuda if device.type == "cuda" else _time_cpu)(run, seconds) / copies * 1e3


def _time_cpu(run: Callable[[], None], seconds: float) -> float:
    """Median seconds of `run`."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_REPEATS or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _time_cuda(run: Callable[[], None], seconds: float) -> float:
    """Median seconds of `run` inside a CUDA graph, as the runner launches it."""
    from lampq_rt.kernels.gpu.scratch import captured

    times: list[float] = []
    with captured(run) as replay:
        started = time.perf_counter()
        while len(times) < LEAST_REPEATS or time.perf_counter() - started < seconds:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _function(op: str) -> Any:
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def _is_weight(value: Any) -> bool:
    return isinstance(value, TensorSpec) and value.is_weight


def _arguments(
    call: Call, activations: dict[str, Any], device: torch.device, generator: torch.Generator
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments with weights of their own and shared activations."""
    keyword_only = {a.name for a in _function(call.op)._schema.arguments if a.kwarg_only}
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, value in call.args:
        made = _fill(name, value, device, generator) if _is_weight(value) else activations[name]
        if name in keyword_only or keywords or len(positional) < _index(call.op, name):
            keywords[name] = made
        else:
            positional.append(made)
    return positional, keywords


def _index(op: str, name: str) -> int:
    return next(i for i, a in enumerate(_function(op)._schema.arguments) if a.name == name)


def _fill(name: str, value: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Random tensors in the place of `TensorSpec`s."""

    def made(leaf: Any) -> Any:
        return _random(name, leaf, device, generator) if isinstance(leaf, TensorSpec) else leaf

    return tree_map(made, value)


def _random(name: str, spec: TensorSpec, device: torch.device, generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point and name.endswith("scale") and spec.is_weight:
        return torch.full(spec.shape, CODE_STEP, dtype=spec.dtype, device=device)
    extent = sum((n - 1) * s for n, s in zip(spec.shape, spec.stride or (), strict=False)) + 1
    count = extent if spec.stride is not None else torch.Size(spec.shape).numel()
    if spec.dtype.is_floating_point:
        flat = torch.randn(count, device=device, generator=generator).to(spec.dtype)
    elif spec.dtype in (torch.int8, torch.uint8):
        low, high = (-128, 128) if spec.dtype == torch.int8 else (0, 256)
        flat = torch.randint(low, high, (count,), device=device, generator=generator, dtype=spec.dtype)
    elif spec.dtype in (torch.int32, torch.int64, torch.bool):
        flat = torch.zeros(count, device=device, dtype=spec.dtype)
    else:
        raise BackendError(f"cannot time an op on tensors of {spec.dtype}")
    return flat.as_strided(spec.shape, spec.stride) if spec.stride is not None else flat.view(spec.shape)
