"""Calls of the Triton launchers that are both run in the interpreter and compiled.

The interpreter accepts shapes that the compiler rejects (a dot over 16 channels, for one), so what one test runs the
other must compile: both read this list. Sizes are odd on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.kernels import reference
from lampq_rt.plan import Plan
from lampq_rt.standin import stand_in_plan
from tests.plans import channel_plan, range_plan, softmax_plan, table_plan, tiny_vit

Case = tuple[str, tuple[Any, ...]]
"""An op's name and its arguments, on the CPU."""

QUANTIZE = ((8, torch.int8), (5, torch.int8), (4, torch.int8), (4, torch.int4), (2, torch.int4))
"""(bits, container)."""
NORM_WIDTHS = (64, 192, 320)
LINEARS = ((197, 192, 64), (198, 64, 1000), (49, 768, 192), (1, 128, 64), (66, 320, 128))
"""(M, K, N)."""
A_BITS, W_BITS = (8, 4), (8, 4, 2)
SPLITS = (2, 3)
QKV = ((2, 197, 2, 64), (1, 198, 1, 32), (2, 49, 2, 48), (2, 5, 1, 80), (1, 17, 3, 64))
"""(images, tokens, heads, head_dim)."""
QKV_BITS = ((8, 8), (4, 6))
ATTENTION = tuple((n, d) for n in (1, 49, 197, 198, 256) for d in (32, 64, 72)) + (
    (49, 48), (49, 80), (49, 96), (49, 128), (300, 64), (577, 80),
)  # fmt: skip
"""(tokens, head_dim); few rows are tried with every head size, long ones with two."""
SOFTMAX = ((8, "rowmax"), (4, "rowmax"), (4, "log2"), (3, "log2"), (4, "cubic"), (7, "cubic"))
"""(bits, scheme) of P."""
FLOAT_SOFTMAX = (SOFTMAX[0], *SOFTMAX[2:])
HEADS = ((197, 64), (198, 32), (49, 48), (49, 80), (5, 72), (1, 64), (16, 128))
"""(tokens, head_dim)."""
AFFINE = ("none", "plain", "weight", "both")
ROWS = ((197, 192, 192), (66, 768, 192), (49, 384, 384), (70, 128, 320), (1, 64, 64))
"""(M, K, N)."""
ROWS_BITS = ((8, 8, 8), (8, 4, 8), (4, 4, 4), (4, 8, 4))
Bits = dict[str, int] | int
MODELS: tuple[tuple[Bits, int | None, str], ...] = (
    (8, None, "rowmax"), (4, None, "rowmax"), (4, 4, "rowmax"),
    ({"default": 8, "fc1": 4, "fc2": 3, "proj": 16}, None, "rowmax"), ({"default": 5, "qkv": 4}, 4, "rowmax"),
    (8, None, "log2"), (4, None, "log2"), (8, None, "cubic"), (4, None, "cubic"),
)  # fmt: skip
"""(bits of every site or by kind, bits of the linears' inputs where they differ, scheme of P). P of "log2" and of
"cubic" has 4 bits."""
CHANNELS: tuple[Bits, ...] = (8, 4, {"default": 8, "fc1": 16})
"""Bits of models whose fc2 have inputs by channel."""


def codes(shape: tuple[int, ...], bits: int, *, weight: bool = False, seed: int = 0) -> Tensor:
    """Random codes of that width."""
    low, high = reference.code_range(bits, weight=weight)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def weight_levels(bits: int, seed: int = 0) -> Tensor:
    """int8 [16]: random levels in no order; codes of that width name some of them, -127 and 127 among those."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, (reference.LEVELS,), dtype=torch.int8, generator=generator)
    used = torch.randperm(1 << bits, generator=generator) + reference.LEVELS // 2 - (1 << (bits - 1))
    levels[used[:2]] = torch.tensor([-127, 127], dtype=torch.int8)
    return levels


def quantize_cases(bits: int, dtype: torch.dtype) -> Iterator[Case]:
    """Ties, values far outside, and layernorms with and without weights."""
    ties = torch.cat([torch.arange(-140, 140) + 0.5, torch.tensor([127.6, -128.5, 1e30, -1e30])])
    x = torch.cat([ties, torch.randn(5 * 192 - len(ties)) * 60]).view(5, 192)
    yield "quantize", (x, 1.0, 0, bits, dtype)
    steps = 2.0 ** torch.randint(-2, 3, (192,))  # ties stay ties
    for channels in ((steps, torch.arange(-96.0, 96.0)), (torch.rand(192) + 0.5, torch.randn(192) * 40)):
        yield "quantize_channels", (x, *channels, bits, dtype)
    for width in NORM_WIDTHS:
        x = torch.randn(2, 7, width) * 4 + 1
        x[0, 0] = 3.0
        for affine in ((torch.randn(width), torch.randn(width)), (None, None)):
            yield "layernorm_quantize", (x, *affine, 1e-6, 20.0, 3, bits, dtype)


def linear_case(
    shape: tuple[int, int, int], a_bits: int, w_bits: int, levels: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x_q and w_q, packed where 4 bits, scale, column, bias; results spread over the codes of an 8-bit output."""
    m, k, n = shape
    x_q, w_q = codes((1, m, k), a_bits), codes((n, k), w_bits, weight=True, seed=1)
    torch.manual_seed(2)
    spread = math.sqrt(k) * 2 ** (a_bits + (w_bits if levels is None else 8)) / 12
    scale = (torch.rand(n) + 0.5) / spread
    scale[::3] *= -1
    stored = [reference.pack_int4(t) if bits <= 4 else t for t, bits in ((x_q, a_bits), (w_q, w_bits))]
    return (*stored, scale, reference.column_constant(stored[1], -3, levels), torch.randn(n))


def linear_cases(shape: tuple[int, int, int], a_bits: int, w_bits: int, levels: Tensor | None = None) -> Iterator[Case]:
    """Every epilogue but that of qkv."""
    case, last = linear_case(shape, a_bits, w_bits, levels), () if levels is None else (levels,)
    for activation in ("none", "gelu"):
        for bits, dtype in ((8, torch.int8), (4, torch.int4 if shape[2] % 64 == 0 else torch.int8)):
            step = 30.0 if bits == 8 else 2.0
            tail = (bits, dtype, *((None, *last) if last else ()))
            yield "linear_requant", (*case, activation, step, -2, *tail)
            channels = ((torch.rand(shape[2]) + 0.5) * step, torch.randn(shape[2]) * 2)
            yield "linear_requant_channels", (*case, activation, *channels, *tail)
    for dtype in (torch.float32, torch.float16):
        yield "linear_float", (*case, "none", dtype, *last)
        yield "linear_residual", (torch.randn(1, shape[0], shape[2]).to(dtype), *case, *last)


def qkv_case(case: tuple[int, int, int, int], bits: tuple[int, int], levels: Tensor | None = None) -> Case:
    """qkv with its heads laid out; with `levels`, the weight's codes have 4 bits."""
    batch, tokens, heads, head_dim = case
    width = heads * head_dim
    w_q = codes((3 * width, width), 8 if levels is None else 4, weight=True)
    w_q = w_q if levels is None else reference.pack_int4(w_q)
    x_q = codes((batch, tokens, width), 8, seed=5)
    scale = (torch.rand(3 * width) + 0.5) / (math.sqrt(width) * 5500)
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    column = reference.column_constant(w_q, 9, levels)
    args = (x_q, w_q, scale, column, torch.randn(3 * width), heads, steps, *bits)
    return "linear_qkv", args if levels is None else (*args, levels)


def attention_cases(tokens: int, head_dim: int) -> Iterator[Case]:
    """P in every scheme, codes out; then floating point, one case for each of `FLOAT_SOFTMAX`."""
    q, k, v = (codes((1, 2, tokens, head_dim), 8, seed=s) for s in range(3))
    v = reference.transpose_v(v)
    scales = (torch.tensor([1e-3, 3e-5]), torch.tensor([0.7, 0.2]))
    for p in SOFTMAX:
        for bits, dtype in ((8, torch.int8), (4, torch.int4 if head_dim == 64 else torch.int8)):
            yield "attention", (q, k, v, *scales, *p, 1.5 if bits == 8 else 0.1, -2, bits, dtype)
    for p in FLOAT_SOFTMAX:
        yield "attention", (q, k, v, *scales, *p, 1.0, 0, 16, torch.float32)


def heads_cases(tokens: int, head_dim: int, affine: str) -> Iterator[Case]:
    """q, k and v of a floating-point qkv, each dtype; `affine` is of the norm of q and k: none, plain, weight, both."""
    batch, heads = 2, 3
    torch.manual_seed(1)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim) * 3 + 0.5
    norms = [torch.randn(head_dim) for _ in range(4)] if affine == "both" else [None] * 4
    if affine == "weight":
        norms[::2] = torch.randn(head_dim), torch.randn(head_dim)
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for bits in ((8, 8), (4, 6)):
            yield "heads_quantize", (qkv.to(dtype), affine != "none", *norms, 1e-5, heads, steps, *bits)


def rows_cases(shape: tuple[int, int, int], bits: tuple[int, int, int], levels: Tensor | None = None) -> Iterator[Case]:
    """A residual with the LayerNorm that follows; `bits` of input, weight and output."""
    (m, _, width), (a_bits, w_bits, out_bits) = shape, bits
    case = linear_case(shape, a_bits, w_bits, levels)
    container = torch.int4 if out_bits == 4 else torch.int8
    for norm, dtype in (((torch.randn(width), torch.randn(width)), torch.float16), ((None, None), torch.float32)):
        x = (torch.randn(1, m, width) * 3 + 1).to(dtype)
        tail = (*norm, 1e-6, 20.0 if out_bits == 8 else 2.0, 3, out_bits, container)
        yield "linear_residual_layernorm", (x, *case, *tail, *(() if levels is None else (None, levels)))


def weight_level_cases() -> Iterator[Case]:
    """Calls with packed weights whose codes name levels: every op, of a qkv those whose K can be packed."""
    for seed, shape in enumerate(((37, 192, 65), *LINEARS[3:])):
        for a_bits, w_bits in ((8, 4), (4, 3)) if seed % 2 else ((8, 2), (4, 4)):
            yield from linear_cases(shape, a_bits, w_bits, weight_levels(w_bits, seed))
    for shape, bits in zip(ROWS[3:], ROWS_BITS[1:], strict=False):
        yield from rows_cases(shape, bits, weight_levels(4))
    yield from (qkv_case(case, bits, weight_levels(4)) for case in (QKV[0], QKV[4]) for bits in QKV_BITS)


def with_dense_weight(case: Case) -> Case:
    """The same call of one of `weight_level_cases` with the levels themselves as weight."""
    name, (*args, levels) = case
    place = 2 if name.startswith("linear_residual") else 1
    args[place] = reference.dense_weight(args[place], levels)
    return name, tuple(args)


def level_cases() -> Iterator[Case]:
    """Calls, whose codes are of 8 bits, of every op that makes codes; a table is still to be added."""
    some = [*quantize_cases(8, torch.int8), *linear_cases((197, 192, 64), 8, 4), *linear_cases((49, 64, 1000), 8, 8)]
    some += [*attention_cases(49, 48), *attention_cases(197, 64), *attention_cases(300, 32)]
    some += [case for shape in ROWS for case in rows_cases(shape, (8, 8, 8))]
    for name, args in some:
        if args[-1] == torch.int8:
            yield name, args


def in_one_kernel(
    args: tuple[Any, ...], config: Any, table: Tensor | None = None, levels: Tensor | None = None
) -> Tensor:
    """`linear_residual_layernorm` by the kernel that holds whole rows; x is args[0], in place."""
    from lampq_rt.kernels.gpu import impl, start

    *operands, bits, dtype = args
    out = impl._empty(args[0], tuple(args[0].shape), dtype).fill_(99)
    start.rows(config, *operands[:6], out, *operands[6:], reference.code_range(bits), table, levels)
    return out


def model_case(bits: Bits, input_bits: int | None, p_scheme: str) -> tuple[nn.Module, Plan, Tensor]:
    """A tiny model with LayerScale, its plan and two images."""
    model = tiny_vit(init_values=0.5)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    plan = stand_in_plan(model, images, bits, input_bits=input_bits)
    return model, plan if p_scheme == "rowmax" else softmax_plan(plan, 4, p_scheme), images


def channel_case(bits: Bits) -> tuple[nn.Module, Plan, Tensor]:
    """A tiny model, its plan with steps by channel before fc2, and two images."""
    model = tiny_vit(init_values=0.5)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model, channel_plan(model, range_plan(model, images, bits), images), images


def table_case(bits: int, channels: bool) -> tuple[nn.Module, Plan, Tensor]:
    """A tiny model whose fc2 and proj have levels from a table, fc2 by channel where asked for, and two images."""
    model, plan, images = channel_case(8) if channels else model_case(8, None, "rowmax")
    return model, table_plan(plan, bits), images


def deit_block() -> tuple[nn.Module, Plan, Tensor]:
    """One block of DeiT-Tiny's size at 197 tokens."""
    model = tiny_vit(img_size=224, patch_size=16, embed_dim=192, depth=1, num_heads=3)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    return model, range_plan(model, images, 8), images
