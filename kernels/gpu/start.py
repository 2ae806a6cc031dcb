"""What the launchers of `impl` and the tuner share: the facts of a GPU, and starting kernels that write where told."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, tables
from lampq_rt.kernels.gpu import linear as linear_kernels
from lampq_rt.kernels.gpu.layernorm import layernorm_quantize_kernel
from lampq_rt.kernels.gpu.rows import linear_rows_kernel
from lampq_rt.kernels.gpu.scratch import split_scratch

FULL = reference.code_range(8)
NAMES = ("requant", "float", "residual", "heads")
"""Epilogues by their number in `linear.py`."""


@cache
def device_of(index: int | None) -> tuple[str, int, bool]:
    """(architecture, processors, whether PTX may be used) of a GPU; an H100's in the interpreter.

    The architecture is "sm90" and the like, on AMD "gfx942" and the like: the names of `configs` and the tables.
    """
    if index is None or os.environ.get("TRITON_INTERPRET") == "1":
        return "sm90", 132, False
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count, False
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count, True


def architecture(index: int) -> str:
    """Of the GPU with that index, as tables are named: "sm90"."""
    return device_of(index)[0]


def facts(x: Tensor) -> tuple[str, int, bool]:
    """`device_of` the GPU that holds `x`."""
    return device_of(x.device.index if x.is_cuda else None)


def as_bytes(codes: Tensor) -> Tensor:
    """Packed codes as the int8 bytes that kernels shift and mask."""
    return codes.view(torch.int8) if codes.dtype == torch.uint8 else codes


def words(levels: Tensor | None, w_q: Tensor) -> Tensor | None:
    """Levels of a packed weight, int8 [16], as the int32 [4] that kernels load."""
    assert levels is None or w_q.dtype == torch.uint8, "an int8 weight holds the levels themselves"
    return None if levels is None else levels.view(torch.int32)


def linear(
    epilogue: Any,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    out: Tensor,
    **options: Any,
) -> None:
    """Start `linear_kernel`; `options` are its epilogue's arguments by the kernel's names."""
    b_packed = w_q.dtype == torch.uint8
    n, k = w_q.shape[0], w_q.shape[1] * (2 if b_packed else 1)
    a_packed = x_q.shape[-1] != k
    x_q = x_q.contiguous()
    m = x_q.numel() // x_q.shape[-1]
    arch, processors, ptx = facts(x_q)
    bits = (4 if a_packed else 8, 4 if b_packed else 8)
    config = options.pop("config", None)
    if config is None:
        gelu, out_packed = bool(options.get("gelu")), bool(options.get("out_packed"))
        key = tables.linear_key(NAMES[epilogue.value], m, n, k, *bits, 4 if out_packed else 8, gelu)
        config = tables.linear(arch, key) or configs.linear_config(m, n, k, processors, arch, *bits)
    images, tokens, heads, head_dim = options.pop("layout", (1, 1, 1, 1))
    padded = reference.padded_tokens(tokens)
    if epilogue == linear_kernels.HEADS:
        width = heads * head_dim
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(2 * width, config.block_n)
        tiles += images * triton.cdiv(padded, config.block_m) * triton.cdiv(width, config.block_n)
        split = 1
    else:
        tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
        split = config.split_k
    partial, locks = split_scratch(x_q, m * n, tiles) if split > 1 else (column, column)
    channels = "offset" in options
    low, high = options.pop("codes", FULL)
    v_low, v_high = options.pop("v_codes", (low, high))
    linear_kernels.linear_kernel[(tiles, split)](
        as_bytes(x_q), as_bytes(w_q), scale, column, bias if bias is not None else scale, as_bytes(out),
        options.pop("k", out), options.pop("v", out), options.pop("step", scale), options.pop("offset", scale),
        options.pop("table", None), words(options.pop("levels", None), w_q), partial, locks,
        m, n, k, tokens, padded, options.pop("inv_scale", 1.0), float(options.pop("zero_point", 0)),
        EPILOGUE=epilogue, GELU=options.pop("gelu", False), FAST_GELU=ptx, HAS_BIAS=bias is not None,
        LOW=low, HIGH=high, V_LOW=v_low, V_HIGH=v_high,
        A_PACKED=a_packed, B_PACKED=b_packed, OUT_PACKED=options.pop("out_packed", False),
        CHANNELS=channels, HEADS_=heads, HEAD_DIM=head_dim, IMAGES=images,
        EVEN_K=k % (config.block_k * split) == 0, SPLIT_K=split, PTX=ptx,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.warps, num_stages=config.stages, **configs.register_limit(config, arch),
    )  # fmt: skip
    assert not options, f"unknown options {sorted(options)}"


def rows_config(x_q: Tensor, w_q: Tensor) -> configs.LinearConfig | None:
    """What `rows` runs with; None where two kernels are to be started."""
    width = w_q.shape[0]
    if width > configs.MAX_ROW:
        return None
    k = w_q.shape[1] * (2 if w_q.dtype == torch.uint8 else 1)
    bits = (8 if x_q.shape[-1] == k else 4, 4 if w_q.dtype == torch.uint8 else 8)
    m = x_q.numel() // x_q.shape[-1]
    return tables.rows(facts(x_q)[0], tables.linear_key("rows", m, width, k, *bits, 8, False))


def rows(
    config: configs.LinearConfig,
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    codes: tuple[int, int],
    table: Tensor | None = None,
    levels: Tensor | None = None,
) -> None:
    """Start `linear_rows_kernel`: `x` contiguous, at most `configs.MAX_ROW` wide; `out` in its container."""
    assert x.is_contiguous()
    width = w_q.shape[0]
    b_packed = w_q.dtype == torch.uint8
    k = w_q.shape[1] * (2 if b_packed else 1)
    a_packed = x_q.shape[-1] != k
    x_q = x_q.contiguous()
    m, ptx = x_q.numel() // x_q.shape[-1], facts(x_q)[2]
    linear_rows_kernel[(triton.cdiv(m, config.block_m),)](
        as_bytes(x_q), as_bytes(w_q), scale, column, bias if bias is not None else scale, x,
        norm_weight if norm_weight is not None else scale, norm_bias if norm_bias is not None else scale,
        table, words(levels, w_q), as_bytes(out), m, width, k, eps, inv_scale, float(zero_point),
        bias is not None, norm_weight is not None, norm_bias is not None, *codes,
        a_packed, b_packed, out.dtype == torch.uint8, k % config.block_k == 0, ptx,
        config.block_m, *configs.row_tiles(width), config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def layernorm(
    x: Tensor,
    out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    codes: tuple[int, int],
    table: Tensor | None = None,
) -> None:
    """Start `layernorm_quantize_kernel`: `x` contiguous; `out` in its container."""
    width = x.shape[-1]
    rows = x.numel() // width
    block_m, block_d = configs.layernorm_blocks(width)
    layernorm_quantize_kernel[(triton.cdiv(rows, block_m),)](
        x, weight if weight is not None else x, bias if bias is not None else x, table, as_bytes(out),
        rows, width, eps, inv_scale, float(zero_point),
        weight is not None, bias is not None, *codes, out.dtype == torch.uint8, facts(x)[2], block_m, block_d,
        num_warps=4,
    )  # fmt: skip
