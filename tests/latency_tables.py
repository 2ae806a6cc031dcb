"""Latency tables made by hand, for tests: no figure in them was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lampq_rt.latency.calls import Call, TensorSpec
from lampq_rt.latency.predict import Predictor
from lampq_rt.latency.table import LatencyTable, ModelEntry

CONVERSION_MS = 0.4
"""What a quantisation of its own costs."""


def hand_made(
    model: nn.Module,
    input_size: Sequence[int],
    batches: Sequence[int],
    price: Callable[[Call, int], float],
    *,
    device: str = "cpu",
    threads: int = 1,
    machine: str = "abacus",
    baselines: dict[str, float] | None = None,
) -> LatencyTable:
    """A table for `model`: ops cost what `price` says of call and batch, whole models the sum of their ops."""
    table = LatencyTable(machine, device, threads)
    for batch in batches:
        predictor = Predictor(table, model, input_size, batch)
        needed = predictor.needed()
        calls = {key: price(counted.call, batch) for key, counted in needed.items()}
        total = sum(calls[key] * counted.count for key, counted in predictor.reference.items())
        entry = ModelEntry("by hand", batch, {"lampq": total, **(baselines or {"fp32-eager": 4 * total})})
        table = table.updated(calls, {predictor.fingerprint: entry})
    return table


def gpu_price(call: Call, batch: int) -> float:
    """A GPU's pattern: weights decide at batch 1, so that 4 bits are faster; arithmetic at 8; conversions cost."""
    if call.op.startswith("lampq::quantize"):
        return CONVERSION_MS
    if "linear" not in call.op:
        return 0.05
    tensors = [value for _, value in call.args if isinstance(value, TensorSpec)]
    if batch == 1:
        return 0.05 + call.weight_bytes * 1e-5
    rows = max(t.nbytes for t in tensors if not t.is_weight)
    return 0.05 + rows * 1e-6 * (2.0 if call.op.startswith("aten::") else 1.0)
