"""The parts of `python -m benchmarks.gpu`, each a function that gives JSON-able facts and a line of summary."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

import lampq_rt
from benchmarks.gpu.models import timing_plan
from lampq_rt import tuning
from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, impl, start, tables, tune
from lampq_rt.kernels.gpu.work import LinearWork
from lampq_rt.kernels.ops import NATIVE, SCHEMAS

Facts = dict[str, Any]

TUNE_SECONDS = 140
"""The tuner starts no further shape after this: what is left, the smallest, keeps the rule of thumb."""


def bench(function: Callable[[], object]) -> dict[str, float]:
    """Median and spread of a call in milliseconds, with the L2 cache cleared in between."""
    low, median, high = triton.testing.do_bench(function, warmup=25, rep=200, quantiles=[0.2, 0.5, 0.8])
    return {"p20": low, "median": median, "p80": high}


def correctness(_: list[str], __: Path, ___: Path | None) -> Facts:
    """Every op on the GPU against the reference on the CPU, each fed the same inputs."""
    from benchmarks.gpu.cases import cases

    rows = []
    for label, name, args in cases():
        on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        came = _results(getattr(NATIVE, name)(*on_gpu), name, on_gpu)
        before = args[0].clone()
        wanted = _results(getattr(reference, name)(*args), name, list(args))
        if name == "linear_residual_layernorm":  # two kernels above; here the one that a table may prefer
            came += _in_one_kernel([before.cuda(), *on_gpu[1:]])
            wanted *= 2
        for got, want in zip(came, wanted, strict=True):
            got = got.cpu()
            if got.dtype == torch.uint8:
                got, want = reference.unpack_int4(got), reference.unpack_int4(want)
            difference = (got.double() - want.double()).abs()
            rows.append(
                {"case": label, "max": float(difference.max()), "rate": float((difference > 0).double().mean())}
            )
    worst = max((r for r in rows if "float" not in r["case"] and "residual" not in r["case"]), key=lambda r: r["max"])
    assert {name for _, name, _ in cases()} == set(SCHEMAS)
    return {"rows": rows, "summary": f"{len(rows)} results, worst code difference {worst['max']:.0f} ({worst['case']})"}


def _results(came: Any, name: str, args: list[Any]) -> list[torch.Tensor]:
    """Everything that an op wrote."""
    found = [] if came is None else list(came) if isinstance(came, tuple) else [came]
    return [args[0], *found] if name.startswith("linear_residual") else found


def _in_one_kernel(args: list[Any]) -> list[torch.Tensor]:
    """x and codes of `linear_residual_layernorm` by `linear_rows_kernel`."""
    *operands, bits, dtype = args[:13]
    out = impl._empty(args[0], tuple(args[0].shape), dtype)
    start.rows(configs.ROWS_CANDIDATES[0], *operands[:6], out, *operands[6:], reference.code_range(bits), *args[13:])
    return [args[0], out]


def ceilings(_: list[str], __: Path, ___: Path | None) -> Facts:
    """What this GPU gives at best: copy, bf16 and int8 matmul."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy_ms = bench(lambda: y.copy_(x))["median"]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bf16_ms = bench(lambda: a @ a)["median"]
    q = torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8)
    int8_ms = bench(lambda: torch._int_mm(q, q.t()))["median"]
    gb_s, bf16, int8 = 2 * x.numel() / copy_ms / 1e6, 2 * 8192**3 / bf16_ms / 1e9, 2 * 8192**3 / int8_ms / 1e9
    summary = f"copy {gb_s:.0f} GB/s, bf16 {bf16:.0f} TFLOP/s, int8 (cuBLASLt) {int8:.0f} TOP/s"
    return {
        "copy_gb_s": gb_s,
        "bf16_tflops": bf16,
        "int8_tops": int8,
        "gpu": torch.cuda.get_device_name(),
        "summary": summary,
    }


def gemm(_: list[str], __: Path, ___: Path | None) -> Facts:
    """TOP/s of the linears of ViT-Base at batch 64, by epilogue, each at its best configuration.

    4-bit weights are also timed with levels; a best configuration of its own would ask for keys of its own in tables.
    """
    rows = []
    for epilogue, n, k, gelu in (
        ("float", 3072, 768, False), ("requant", 3072, 768, False), ("requant", 3072, 768, True),
        ("residual", 768, 3072, False), ("residual", 768, 768, False), ("heads", 2304, 768, False),
    ):  # fmt: skip
        m = 64 * 197
        for a_bits, w_bits, levels in ((8, 8, False), (8, 4, False), (8, 4, True), (4, 4, False)):
            work = LinearWork(epilogue, m, n, k, a_bits, w_bits, gelu=gelu, heads=12, tokens=197)
            best = tune.tune_linear(work, levels=levels)
            row = {
                "key": work.key + (" weight levels" if levels else ""),
                "ms": best.ms,
                "rule_ms": best.rule_ms,
                "config": best.config and best.config.to_json(),
            }
            rows.append({**row, "tops": work.operations / best.ms / 1e9})
    top = max(rows, key=lambda r: r["tops"])
    return {"rows": rows, "summary": f"best {top['tops']:.0f} TOP/s ({top['key']})"}


def attention(_: list[str], __: Path, ___: Path | None) -> Facts:
    """Attention of ViT-Base at batch 64 against bf16 scaled_dot_product_attention."""
    b, h, n, d = 64, 12, 197, 64
    q, k, v = (torch.randint(-127, 128, (b, h, n, d), device="cuda", dtype=torch.int8) for _ in range(3))
    v = reference.transpose_v(v)
    c, s = torch.full((h,), 1e-3, device="cuda"), torch.ones(h, device="cuda")
    ours, log2, cubic = (
        bench(lambda p=p: impl.attention(q, k, v, c, s, *p, 1.0, 0, 8, torch.int8))
        for p in ((8, "rowmax"), (4, "log2"), (4, "cubic"))
    )
    f = torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16)
    sdpa = bench(lambda: torch.nn.functional.scaled_dot_product_attention(f, f, f))
    ratio = sdpa["median"] / ours["median"]
    summary = f"{ours['median']:.3f} ms, {ratio:.2f} x SDPA bf16; log2 P {log2['median']:.3f}, "
    summary += f"cubic P {cubic['median']:.3f} ms"
    return {"ours_ms": ours, "log2_ms": log2, "cubic_ms": cubic, "sdpa_bf16_ms": sdpa, "summary": summary}


def tune_model(args: list[str], out: Path, _: Path | None) -> Facts:
    """Tune the linears of one model at one batch, for the user's table; a copy of it is written to `out`."""
    import timm

    name, batch = args[0], int(args[1])
    with torch.device("meta"):
        model = timm.create_model(name)
    arch = tuning.gpu_architecture()
    works = tuning.launches(model, (3, *model.patch_embed.img_size), [batch])
    found, done, started = {}, 0, time.monotonic()
    for work, tuned in tune.tune_all(works, arch):
        done += 1
        if tuned is not None:
            found[work.key] = tuned.config
        tables.save(arch, tables.read(tables.user_table(arch)), out / f"{arch}.json")
        if time.monotonic() - started > TUNE_SECONDS:
            break
    summary = f"{len(found)} shapes tuned for {arch}, {len(works) - done} left"
    return {"entries": {k: c and c.to_json() for k, c in found.items()}, "summary": summary}


def model_speed(args: list[str], _: Path, __: Path | None) -> Facts:
    """One model and batch: W8A8, W4A8, W4A4 and mixed plans against `torch.compile` bf16 with CUDA graphs."""
    import timm

    name, batch, mode = args[0], int(args[1]), args[2]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    compile_mode = {"max-autotune": "max-autotune", "default": "reduce-overhead"}[mode]
    rows: dict[str, Any] = {}
    with torch.inference_mode():
        for label, bits, input_bits in (("w8a8", 8, 8), ("w4a8", 4, 8), ("w4a4", 4, 4), ("mixed", None, None)):
            fast = lampq_rt.compile(model, timing_plan(model, bits, input_bits), device="cuda")
            memory = activation_bytes(lambda fast=fast: fast.model(images))
            row = {**bench(lambda fast=fast: fast(images)), "weight_bytes": fast.weight_bytes, **memory}
            rows[label] = {**row, "graph_bytes": fast.graph_memory_bytes}
            if label == "w8a8":
                rows |= micro_batches(fast, images)
            del fast
        half = model.cuda().bfloat16()
        compiled = torch.compile(half, mode=compile_mode)
        cast = images.bfloat16()
        memory = activation_bytes(lambda: half(cast))
        rows["bf16-compile"] = {**bench(lambda: compiled(cast)), **memory}
        rows["bf16-eager"] = bench(lambda: half(cast))
    ratio = rows["bf16-compile"]["median"] / rows["w8a8"]["median"]
    summary = f"W8A8 {rows['w8a8']['median']:.3f} ms, {ratio:.2f} x torch.compile bf16 ({mode})"
    return {"rows": rows, "images_per_s": batch / rows["w8a8"]["median"] * 1e3, "ratio": ratio, "summary": summary}


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
            fast(images)
            rows[f"w8a8 {'whole' if size is None else f'micro-batch {size}'}"] = bench(lambda: fast(images))
    return rows


def peers(args: list[str], _: Path, __: Path | None) -> Facts:
    """torchao int8 and fp8 rowwise on the same model, where it is installed."""
    import timm
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    name, batch = args[0], int(args[1])
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    rows = {}
    for label, config in (
        ("torchao-int8", Int8DynamicActivationInt8WeightConfig()),
        ("torchao-fp8-row", Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
    ):
        torch._inductor.config.force_fuse_int_mm_with_mul = True
        model = timm.create_model(name).eval().cuda().bfloat16()
        quantize_(model, config)
        compiled = torch.compile(model, mode="max-autotune")
        with torch.inference_mode():
            rows[label] = bench(lambda compiled=compiled: compiled(images))
    return {"rows": rows, "summary": ", ".join(f"{k} {v['median']:.3f} ms" for k, v in rows.items())}


def gemlite(args: list[str], _: Path, __: Path | None) -> Facts:
    """gemlite's dynamic int8 linears in the same model, where it is installed."""
    import timm
    from gemlite.helper import A8W8_INT8_dynamic

    name, batch = args[0], int(args[1])
    model = timm.create_model(name).eval().cuda().half()
    for block in model.blocks:
        for owner, attribute in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(owner, attribute, A8W8_INT8_dynamic(device="cuda:0").from_linear(getattr(owner, attribute)))
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.float16)
    compiled = torch.compile(model, mode="max-autotune")
    with torch.inference_mode():
        row = bench(lambda: compiled(images))
    return {"rows": {"gemlite-int8": row}, "summary": f"gemlite int8 {row['median']:.3f} ms"}


def sageattention(_: list[str], __: Path, ___: Path | None) -> Facts:
    """SageAttention on the shape of `attention` above, where it is installed: from and to fp16."""
    from sageattention import sageattn

    q, k, v = (torch.randn(64, 12, 197, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    row = bench(lambda: sageattn(q, k, v))
    return {"sageattention_ms": row, "summary": f"sageattention {row['median']:.3f} ms"}


def logits(_: list[str], __: Path, weights: Path | None) -> Facts:
    """GPU logits against the reference's on a real DeiT-Tiny (random weights where none are given)."""
    import timm
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    if weights:
        model.load_state_dict(load_file(weights))
    images = torch.randn(8, 3, 224, 224)
    plan = timing_plan(model, 8, 8)
    with torch.inference_mode():
        came = lampq_rt.compile(model, plan, device="cuda")(images.cuda()).cpu()
        truth, original = lampq_rt.compile(model, plan, backend="reference")(images), model(images)
    rms, noise = float((came - truth).pow(2).mean().sqrt()), float((truth - original).pow(2).mean().sqrt())
    return {"rms": rms, "noise": noise, "summary": f"RMS to reference {rms:.4f}, reference to fp32 {noise:.4f}"}


FUNCTIONS: dict[str, Callable[[list[str], Path, Path | None], Facts]] = {
    "correctness": correctness, "ceilings": ceilings, "gemm": gemm, "attention": attention, "tune": tune_model,
    "model": model_speed, "peers": peers, "gemlite": gemlite,
    "sageattention": sageattention, "logits": logits,
}  # fmt: skip


def main(
    name: str,
    result: Annotated[Path, typer.Option()],
    tables_folder: Annotated[Path, typer.Option("--tables")],
    weights: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Run one part and write its facts."""
    function, *args = name.split(":")
    facts = FUNCTIONS[function](args, tables_folder, weights)
    assert all(math.isfinite(v) for v in facts.values() if isinstance(v, float))
    result.write_text(json.dumps(facts))


if __name__ == "__main__":
    typer.run(main)
