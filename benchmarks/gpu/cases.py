"""Inputs for every op, on shapes that are odd on purpose, in every container."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs

LINEARS = ((197, 192, 576), (50, 768, 3072), (1576, 384, 384), (12, 3072, 768), (198, 128, 1000))
"""(M, K, N), with every epilogue."""

ROWS = (197, 768, 192)
"""(M, K, N) of a linear with LayerNorm whose rows one kernel can hold in every container: of 384 columns, int8 only."""

TABLE = torch.arange(-128, 128).div(2, rounding_mode="floor").to(torch.int8)
"""Levels of which neighbours are at most one apart, as codes are."""


def _codes(shape: tuple[int, ...], bits: int, *, weight: bool = False) -> Tensor:
    low, high = reference.code_range(bits, weight=weight)
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def cases() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(label, op, arguments on the CPU)."""
    torch.manual_seed(0)
    for bits, dtype in ((8, torch.int8), (4, torch.int4)):
        for width in (192, 768, 1024):
            x = torch.randn(3, 67, width) * 3
            yield f"layernorm {width} {bits}", "layernorm_quantize", (x, x[0, 0], x[0, 1], 1e-6, 20.0, 3, bits, dtype)
        ties = torch.arange(-140, 140) + 0.5
        x = torch.cat([ties, torch.randn(2048 - len(ties)) * 60]).view(8, 256)
        yield f"quantize {bits}", "quantize", (x, 1.0, 0, bits, dtype)
        channels = (2.0 ** torch.randint(-2, 3, (256,)), torch.randn(256) * 20)
        yield f"quantize channels {bits}", "quantize_channels", (x, *channels, bits, dtype)
    x = torch.randn(3, 67, 769) * 60
    yield "quantize levels", "quantize", (x, 1.0, 0, 8, torch.int8, TABLE)
    yield "layernorm levels", "layernorm_quantize", (x, None, None, 1e-6, 40.0, 3, 8, torch.int8, TABLE)
    for m, k, n in LINEARS:
        for a_bits, w_bits in ((8, 8), (8, 4), (4, 4)):
            yield from _linear_cases(m, k, n, a_bits, w_bits)
    for a_bits, w_bits in ((8, 8), (8, 4), (4, 4)):
        args, label = _operands(*ROWS, a_bits, w_bits)
        yield _rows_case(args, label)
        if w_bits <= 4:
            yield _rows_case(*_with_levels(args, label))
    yield from _float_cases()
    for batch, tokens, heads, head_dim in ((2, 197, 3, 64), (1, 198, 2, 32), (2, 49, 2, 48), (1, 577, 2, 80)):
        yield from _attention_cases(batch, tokens, heads, head_dim)


def _operands(m: int, k: int, n: int, a_bits: int, w_bits: int) -> tuple[tuple[Any, ...], str]:
    """x_q, w_q, scale, column and bias of a linear, and a label."""
    x_q, w_q = _codes((1, m, k), a_bits), _codes((n, k), w_bits, weight=True)
    scale = (torch.rand(n) + 0.5) * 12 / (math.sqrt(k) * 2 ** (a_bits + w_bits))
    column, bias = reference.column_constant(w_q, -3), torch.randn(n)
    stored = [reference.pack_int4(t) if bits <= 4 else t for t, bits in ((x_q, a_bits), (w_q, w_bits))]
    return (*stored, scale, column, bias), f"{m}x{k}x{n} a{a_bits} w{w_bits}"


def _rows_case(args: tuple[Any, ...], label: str, levels: Tensor | None = None) -> tuple[str, str, tuple[Any, ...]]:
    """A residual with the LayerNorm that follows."""
    m, n = args[0].shape[1], len(args[1])
    norm = (torch.randn(n), torch.randn(n), 1e-6, 20.0, 3, 8, torch.int8)
    args = (torch.randn(1, m, n).half(), *args, *norm, *(() if levels is None else (None, levels)))
    return f"residual+layernorm {label}", "linear_residual_layernorm", args


def _linear_cases(m: int, k: int, n: int, a_bits: int, w_bits: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    args, label = _operands(m, k, n, a_bits, w_bits)
    for activation in ("none", "gelu"):
        yield f"requant {activation} {label}", "linear_requant", (*args, activation, 30.0, -2, 8, torch.int8)
    yield f"requant levels {label}", "linear_requant", (*args, "gelu", 30.0, -2, 8, torch.int8, TABLE)
    inv_scale, offset = (torch.rand(n) + 0.5) * 30.0, torch.randn(n) * 20
    name = "linear_requant_channels"
    yield f"requant channels {label}", name, (*args, "gelu", inv_scale, offset, 8, torch.int8)
    if n % 64 == 0:
        yield f"requant packed {label}", "linear_requant", (*args, "gelu", 2.0, -2, 4, torch.int4)
        yield f"requant channels packed {label}", name, (*args, "gelu", inv_scale / 15, offset / 15, 4, torch.int4)
    yield f"float {label}", "linear_float", (*args, "none", torch.float16)
    yield f"residual {label}", "linear_residual", (torch.randn(1, m, n).half(), *args)
    if n <= configs.MAX_ROW:
        yield _rows_case(args, label)
    if w_bits <= 4:
        yield from _weight_level_cases(args, label)


def _float_cases() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """What plans with layers in floating point launch, in every dtype of the residual stream; and a single row."""
    args, label = _operands(67, 192, 320, 8, 8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"float gelu {name} {label}", "linear_float", (*args, "gelu", dtype)
        yield f"residual {name} {label}", "linear_residual", (torch.randn(1, 67, 320).to(dtype), *args)
    for a_bits, w_bits in ((8, 8), (8, 4), (4, 4)):
        args, label = _operands(1, 768, 1000, a_bits, w_bits)
        yield f"float {label}", "linear_float", (*args, "none", torch.float32)
    x_q, w_q, scale, column, bias = _operands(2 * 50, 192, 576, 4, 4)[0]
    steps = (torch.rand(9) * 20 + 20).repeat_interleave(64)
    heads = (x_q.view(2, 50, -1), w_q, scale, column, bias, 3, steps / 8, 5, 4)
    yield "qkv of packed codes, q and k 5 bits, v 4", "linear_qkv", heads
    q, k, v = (_codes((2, 3, 50, 64), 8) for _ in range(3))
    operands = (q, k, reference.transpose_v(v), torch.rand(3) * 1e-3, torch.rand(3) + 0.1)
    for p in ((8, "rowmax"), (4, "log2"), (4, "cubic")):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            yield f"attention {name} {p[1]} p{p[0]}", "attention", (*operands, *p, 0.0, 0, 16, dtype)
        yield f"attention packed {p[1]} p{p[0]}", "attention", (*operands, *p, 0.1, -2, 4, torch.int4)


def _with_levels(args: tuple[Any, ...], label: str) -> tuple[tuple[Any, ...], str, Tensor]:
    """The same operands with packed codes that name levels, label, levels."""
    x_q, w_q, scale, _, bias = args
    levels = _levels()
    args = (x_q, w_q, scale / 18, reference.column_constant(w_q, -3, levels), bias)
    return args, f"weight levels {label}", levels


def _weight_level_cases(args: tuple[Any, ...], label: str) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Packed weights whose codes name levels, in every epilogue but that of qkv."""
    args, label, levels = _with_levels(args, label)
    m, n = args[0].shape[1], len(args[1])
    yield f"requant {label}", "linear_requant", (*args, "gelu", 30.0, -2, 8, torch.int8, None, levels)
    channels = ((torch.rand(n) + 0.5) * 30.0, torch.randn(n) * 20)
    tail = (8, torch.int8, TABLE, levels)
    yield f"requant channels {label}", "linear_requant_channels", (*args, "none", *channels, *tail)
    yield f"float {label}", "linear_float", (*args, "none", torch.float16, levels)
    yield f"residual {label}", "linear_residual", (torch.randn(1, m, n).half(), *args, levels)
    if n <= configs.MAX_ROW:
        yield _rows_case(args, label, levels)


def _levels() -> Tensor:
    """int8 [16] in no order."""
    levels = torch.randint(-127, 128, (reference.LEVELS,), dtype=torch.int8)
    levels[torch.randperm(reference.LEVELS)[:2]] = torch.tensor([-127, 127], dtype=torch.int8)
    return levels


def _attention_cases(batch: int, tokens: int, heads: int, head_dim: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    width, label = heads * head_dim, f"{tokens} tokens, heads of {head_dim}"
    w_q, x_q = _codes((3 * width, width), 8, weight=True), _codes((batch, tokens, width), 8)
    scale = (torch.rand(3 * width) + 0.5) / (math.sqrt(width) * 5500)
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    column, bias = reference.column_constant(w_q, 9), torch.randn(3 * width)
    yield f"qkv {label}", "linear_qkv", (x_q, w_q, scale, column, bias, heads, steps, 8, 8)
    if width % reference.NIBBLE_GROUP == 0:
        packed, levels = reference.pack_int4(_codes((3 * width, width), 4)), _levels()
        column = reference.column_constant(packed, 9, levels)
        yield f"qkv weight levels {label}", "linear_qkv", (x_q, packed, scale, column, bias, heads, steps, 8, 8, levels)
    floats = torch.randn(batch, tokens, 3 * width)
    norms = [torch.randn(head_dim) for _ in range(4)]
    for kind, x in (("fp32", floats), ("fp16", floats.half())):
        yield f"heads of {kind} {label}", "heads_quantize", (x, False, *[None] * 4, 0.0, heads, steps, 8, 8)
        yield f"heads of {kind} {label}, norm", "heads_quantize", (x, True, *norms, 1e-6, heads, steps, 8, 8)
    q, k, v = (_codes((batch, heads, tokens, head_dim), 8) for _ in range(3))
    scales = (torch.rand(heads) * 1e-3, torch.rand(heads) + 0.1)
    for p in ((8, "rowmax"), (4, "rowmax"), (4, "log2"), (3, "log2"), (4, "cubic")):
        args = (q, k, reference.transpose_v(v), *scales, *p, 1.5, -2, 8, torch.int8)
        yield f"attention {label} {p[1]} p{p[0]}", "attention", args
        yield f"attention levels {label} {p[1]} p{p[0]}", "attention", (*args, TABLE)
