"""Finds the fastest configuration of a linear on this GPU by timing the feasible ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, impl, linear, tables

EPILOGUES = {"requant": linear.REQUANT, "float": linear.FLOAT, "residual": linear.RESIDUAL, "heads": linear.HEADS}
SPLITS = (1, 2, 4, 8)


def candidates(
    m: int, n: int, k: int, arch: str, processors: int, a_bits: int, w_bits: int
) -> Iterator[configs.LinearConfig]:
    """Feasible tiles; K split only where the tiles alone leave processors idle."""
    for config in configs.LINEAR_CANDIDATES:
        if not configs.feasible(config, arch, a_bits, w_bits):
            continue
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        for split in SPLITS:
            if split == 1 or (tiles * split <= 2 * processors and k // split >= 2 * config.block_k):
                yield replace(config, split_k=split)


def tune_linear(
    epilogue: str, m: int, n: int, k: int, *, a_bits: int = 8, w_bits: int = 8, out_bits: int = 8, gelu: bool = False,
    heads: int = 0, tokens: int = 0, out_dtype: torch.dtype = torch.float16,
) -> tuple[str, configs.LinearConfig, float]:  # fmt: skip
    """Time every candidate on random data (zeros would draw less power).

    Args:
        epilogue: "requant", "float", "residual" or "heads" (with `heads` and `tokens`).
        m: rows of the input.
        n: output channels.
        k: input channels.
        a_bits: 8, or 4 for packed activations; likewise w_bits and out_bits.
        gelu: GELU before the requantisation.
        heads: attention heads.
        tokens: rows per image.
        out_dtype: dtype of a floating-point result or residual stream.

    Returns:
        The launch's key, the fastest configuration, its median time in milliseconds.
    """
    case = _case(epilogue, m, n, k, a_bits, w_bits, out_bits, heads, tokens, out_dtype)
    options = _options(epilogue, case, n, out_bits, gelu, heads, tokens)
    arch, processors, _ = impl._of(case["x_q"])
    best, best_ms = None, math.inf
    for config in candidates(m, n, k, arch, processors, a_bits, w_bits):

        def launch(config: configs.LinearConfig = config) -> None:
            args = (case["x_q"], case["w_q"], case["scale"], case["column"], case["bias"], case["out"])
            impl._launch_linear(EPILOGUES[epilogue], *args, config=config, **options)

        try:
            elapsed = float(triton.testing.do_bench(launch, warmup=5, rep=25, return_mode="median"))
        except (triton.runtime.errors.OutOfResources, RuntimeError):
            continue
        if elapsed < best_ms:
            best, best_ms = config, elapsed
    if best is None:
        raise RuntimeError(f"no configuration of linear {epilogue} m={m} n={n} k={k} runs on {arch}")
    return tables.linear_key(epilogue, m, n, k, a_bits, w_bits, out_bits, gelu), best, best_ms


def _case(
    epilogue: str, m: int, n: int, k: int, a_bits: int, w_bits: int, out_bits: int, heads: int, tokens: int,
    out_dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Random operands on the GPU."""
    low, high = reference.code_range(a_bits)
    x_q = torch.randint(low, high + 1, (m, k), dtype=torch.int8, device="cuda")
    low, high = reference.code_range(w_bits, weight=True)
    w_q = torch.randint(low, high + 1, (n, k), dtype=torch.int8, device="cuda")
    case = {
        "x_q": reference.pack_int4(x_q) if a_bits <= 4 else x_q,
        "w_q": reference.pack_int4(w_q) if w_bits <= 4 else w_q,
        "scale": torch.rand(n, device="cuda") / (math.sqrt(k) * 2 ** (a_bits + w_bits - 6)),
        "column": reference.column_constant(w_q, 3),
        "bias": torch.randn(n, device="cuda"),
    }
    if epilogue == "heads":
        images, head_dim = m // tokens, n // (3 * heads)
        case["out"] = torch.empty((images, heads, tokens, head_dim), dtype=torch.int8, device="cuda")
        case["k"] = torch.empty_like(case["out"])
        padded = reference.padded_tokens(tokens)
        case["v"] = torch.empty((images, heads, head_dim, padded), dtype=torch.int8, device="cuda")
        case["step"] = torch.full((n,), 20.0, device="cuda")
    elif epilogue == "requant":
        shape = (m, n // 2) if out_bits <= 4 else (m, n)
        case["out"] = torch.empty(shape, dtype=torch.uint8 if out_bits <= 4 else torch.int8, device="cuda")
    else:
        case["out"] = torch.zeros((m, n), dtype=out_dtype, device="cuda")
    return case


def _options(
    epilogue: str, case: dict[str, Tensor], n: int, out_bits: int, gelu: bool, heads: int, tokens: int
) -> dict[str, Any]:
    if epilogue == "heads":
        layout = (len(case["out"]), tokens, heads, n // (3 * heads))
        return {"k": case["k"], "v": case["v"], "step": case["step"], "layout": layout}
    if epilogue == "requant":
        codes = reference.code_range(min(out_bits, 8))
        return {"gelu": gelu, "inv_scale": 20.0, "codes": codes, "out_packed": out_bits <= 4}
    return {"gelu": gelu}
