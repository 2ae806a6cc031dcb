"""Parts of `python -m benchmarks.gpu` that time whole models and other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lampq_rt
from benchmarks.gpu.job import Facts, Job, attempt, bench
from benchmarks.gpu.models import timing_plan

PLANS: tuple[tuple[str, int | None, int | None], ...] = (
    ("w8a8", 8, 8), ("w4a8", 4, 8), ("w4a4", 4, 4), ("mixed", None, None),
)  # fmt: skip
"""Label, bits of weights, bits of inputs."""


def model_speed(job: Job) -> Facts:
    """One model and batch: W8A8, then `torch.compile` bf16 with CUDA graphs, then plans with fewer bits.

    The two that the headline is made of come first; every row is kept at once.
    """
    import timm

    name, batch, mode = job.args[0], int(job.args[1]), job.args[2]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    rows: dict[str, Any] = {}

    def ours(bits: int | None, input_bits: int | None) -> Facts:
        fast = lampq_rt.compile(model, timing_plan(model, bits, input_bits), device="cuda")
        memory = activation_bytes(lambda: fast.model(images))
        row = {**bench(lambda: fast(images)), "weight_bytes": fast.weight_bytes, **memory}
        row["graph_bytes"] = fast.graph_memory_bytes
        if (bits, input_bits) == (8, 8):
            row["micro_batches"] = attempt(lambda: micro_batches(fast, images))
        return row

    def bf16() -> Facts:
        half, cast = timm.create_model(name).eval().cuda().bfloat16(), images.bfloat16()
        memory = activation_bytes(lambda: half(cast))
        rows["bf16-eager"] = bench(lambda: half(cast))
        compiled = torch.compile(half, mode={"max-autotune": "max-autotune", "default": "reduce-overhead"}[mode])
        return {**bench(lambda: compiled(cast)), **memory}

    work: list[tuple[str, Callable[[], Facts]]] = [
        (label, lambda bits=bits, input_bits=input_bits: ours(bits, input_bits)) for label, bits, input_bits in PLANS
    ]
    work.insert(1, ("bf16-compile", bf16))
    with torch.inference_mode():
        for label, measure in work:
            rows[label] = attempt(measure)
            job.save(facts := _facts(rows, batch, mode))
    return facts


def _facts(rows: dict[str, Any], batch: int, mode: str) -> Facts:
    """Rows, the ratio of the two that matter, and a line."""
    ours, theirs = (rows.get(label, {}).get("median") for label in ("w8a8", "bf16-compile"))
    facts: Facts = {"rows": rows, "summary": "W8A8 did not run" if ours is None else f"W8A8 {ours:.3f} ms"}
    if ours is not None:
        facts["images_per_s"] = batch / ours * 1e3
    if ours is not None and theirs is not None:
        facts["ratio"] = theirs / ours
        facts["summary"] += f", {facts['ratio']:.2f} x torch.compile bf16 ({mode})"
    failed = [label for label, row in rows.items() if "error" in row]
    facts["summary"] += f"; failed: {', '.join(failed)}" if failed else ""
    return facts


def activation_bytes(call: Callable[[], object]) -> Facts:
    """What a call without graphs allocates beyond what is there, at its peak."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return {"activation_bytes": torch.cuda.max_memory_allocated() - before}


def micro_batches(fast: Any, images: torch.Tensor) -> Facts:
    """The same model whole and in micro-batches, to check the rule by which it chooses."""
    rows = {}
    for size in (None, 32, 64, 128):
        if size is None or size < len(images):
            fast.micro_batch = size
            rows["whole" if size is None else str(size)] = bench(lambda: fast(images))
    return rows


def peers(job: Job) -> Facts:
    """torchao int8 and fp8 rowwise on the same model."""
    import timm
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    name, batch = job.args[0], int(job.args[1])
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    rows: dict[str, Any] = {}

    def timed(config: Any) -> Facts:
        model = timm.create_model(name).eval().cuda().bfloat16()
        quantize_(model, config)
        compiled = torch.compile(model, mode="max-autotune")
        with torch.inference_mode():
            return bench(lambda: compiled(images))

    torch._inductor.config.force_fuse_int_mm_with_mul = True
    for label, config in (
        ("torchao-int8", Int8DynamicActivationInt8WeightConfig()),
        ("torchao-fp8-row", Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
    ):
        rows[label] = attempt(lambda config=config: timed(config))
        summary = ", ".join(f"{k} {v['median']:.3f} ms" if "median" in v else f"{k} failed" for k, v in rows.items())
        job.save(facts := {"rows": rows, "summary": summary})
    return facts


def gemlite(job: Job) -> Facts:
    """gemlite's dynamic int8 linears in the same model."""
    import timm
    from gemlite.helper import A8W8_INT8_dynamic

    name, batch = job.args[0], int(job.args[1])
    model = timm.create_model(name).eval().cuda().half()
    for block in model.blocks:
        for owner, attribute in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(owner, attribute, A8W8_INT8_dynamic(device="cuda:0").from_linear(getattr(owner, attribute)))
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    compiled = torch.compile(model, mode="max-autotune")
    with torch.inference_mode():
        row = bench(lambda: compiled(images))
    return {"rows": {"gemlite-int8": row}, "summary": f"gemlite int8 {row['median']:.3f} ms"}


def sageattention(job: Job) -> Facts:
    """SageAttention on the shape of part "attention": from and to fp16."""
    from sageattention import sageattn

    q, k, v = (torch.randn(64, 12, 197, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    row = bench(lambda: sageattn(q, k, v))
    return {"sageattention_ms": row, "summary": f"sageattention {row['median']:.3f} ms"}
