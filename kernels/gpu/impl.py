"""The CUDA implementation of every op in `kernels/ops.py`, by the same names; `reference.py` says what each computes.

Launchers only: they compute sizes, choose a configuration and start one kernel. With TRITON_INTERPRET=1 they run on
CPU tensors too, which is how they are tested without a GPU.
"""

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
from lampq_rt.kernels.gpu.attention import attention_kernel
from lampq_rt.kernels.gpu.heads import heads_kernel
from lampq_rt.kernels.gpu.layernorm import layernorm_quantize_kernel, quantize_kernel
from lampq_rt.kernels.gpu.rows import linear_rows_kernel
from lampq_rt.kernels.gpu.scratch import split_scratch

FULL = reference.code_range(8)
NAMES = ("requant", "float", "residual", "heads")
"""Epilogues by their number in `linear.py`."""


@cache
def _device(index: int | None) -> tuple[str, int, bool]:
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
    return _device(index)[0]


def _of(x: Tensor) -> tuple[str, int, bool]:
    return _device(x.device.index if x.is_cuda else None)


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == reference.INT4:
        return torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device=like.device)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _empty_heads(rows: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, H, N, d] and v [B, H, d, N_pad] for `rows` [B, N, ...]; every byte of them is written by the kernels."""
    batch, tokens = rows.shape[:2]
    q = torch.empty((batch, heads, tokens, head_dim), dtype=torch.int8, device=rows.device)
    shape = (batch, heads, head_dim, reference.padded_tokens(tokens))
    return q, torch.empty_like(q), torch.empty(shape, dtype=torch.int8, device=rows.device)


def _bytes(codes: Tensor) -> Tensor:
    """Packed codes as the int8 bytes that kernels shift and mask."""
    return codes.view(torch.int8) if codes.dtype == torch.uint8 else codes


def quantize(
    x: Tensor, inv_scale: float, zero_point: int, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """See `reference.quantize`."""
    return _launch_quantize(x, inv_scale, zero_point, (x, x), bits, dtype, table, False)


def quantize_channels(
    x: Tensor, inv_scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """See `reference.quantize_channels`."""
    return _launch_quantize(x, 1.0, 0, (inv_scale, offset), bits, dtype, table, True)


def _launch_quantize(
    x: Tensor, inv_scale: float, zero_point: int, channels: tuple[Tensor, Tensor], bits: int, dtype: torch.dtype,
    table: Tensor | None, by_channel: bool,
) -> Tensor:  # fmt: skip
    """Start `quantize_kernel`; `channels` has 1/step and zero-point of each, where those count, not the numbers."""
    x = x.contiguous()
    out = _empty(x, tuple(x.shape), dtype)
    low, high = reference.code_range(bits)
    block = 1024
    quantize_kernel[(triton.cdiv(x.numel(), block),)](
        x, _bytes(out), *channels, table, x.numel(), x.shape[-1], inv_scale, float(zero_point), by_channel, low, high,
        dtype == reference.INT4, _of(x)[2], block,
    )  # fmt: skip
    return out


def layernorm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.layernorm_quantize`."""
    x = x.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    out = _empty(x, tuple(x.shape), dtype)
    block_m, block_d = configs.layernorm_blocks(width)
    layernorm_quantize_kernel[(triton.cdiv(rows, block_m),)](
        x, weight if weight is not None else x, bias if bias is not None else x, table, _bytes(out),
        rows, width, eps, inv_scale, float(zero_point),
        weight is not None, bias is not None, *reference.code_range(bits), dtype == reference.INT4, _of(x)[2],
        block_m, block_d, num_warps=4,
    )  # fmt: skip
    return out


def _launch_linear(
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
    arch, processors, ptx = _of(x_q)
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
        _bytes(x_q), _bytes(w_q), scale, column, bias if bias is not None else scale, _bytes(out),
        options.pop("k", out), options.pop("v", out), options.pop("step", scale), options.pop("offset", scale),
        options.pop("table", None), partial, locks,
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


def linear_float(
    x_q: Tensor, w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype
) -> Tensor:
    """See `reference.linear_float`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    _launch_linear(linear_kernels.FLOAT, x_q, w_q, scale, column, bias, out, gelu=activation == "gelu")
    return out


def linear_requant(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    out_inv_scale: float,
    out_zero_point: int,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    _launch_linear(
        linear_kernels.REQUANT, x_q, w_q, scale, column, bias, out, gelu=activation == "gelu", table=table,
        inv_scale=out_inv_scale, zero_point=out_zero_point, codes=reference.code_range(out_bits),
        out_packed=dtype == reference.INT4,
    )  # fmt: skip
    return out


def linear_requant_channels(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    out_inv_scale: Tensor,
    out_offset: Tensor,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant_channels`; tuned as `linear_requant`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    _launch_linear(
        linear_kernels.REQUANT, x_q, w_q, scale, column, bias, out, gelu=activation == "gelu", table=table,
        step=out_inv_scale, offset=out_offset, codes=reference.code_range(out_bits), out_packed=dtype == reference.INT4,
    )  # fmt: skip
    return out


def linear_residual(x: Tensor, x_q: Tensor, w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None) -> None:
    """See `reference.linear_residual`; `x` contiguous."""
    assert x.is_contiguous()
    _launch_linear(linear_kernels.RESIDUAL, x_q, w_q, scale, column, bias, x)


def linear_residual_layernorm(
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inv_scale: float,
    zero_point: int,
    bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_residual_layernorm`; one kernel where a tuned table prefers it, else two."""
    config = _rows_config(x_q, w_q)
    if config is None:
        linear_residual(x, x_q, w_q, scale, column, bias)
        return layernorm_quantize(x, norm_weight, norm_bias, eps, inv_scale, zero_point, bits, dtype, table)
    out = _empty(x, tuple(x.shape), dtype)
    norm = (norm_weight, norm_bias, eps, inv_scale, zero_point)
    launch_rows(config, x, x_q, w_q, scale, column, bias, out, *norm, reference.code_range(bits), table)
    return out


def _rows_config(x_q: Tensor, w_q: Tensor) -> configs.LinearConfig | None:
    width = w_q.shape[0]
    if width > configs.MAX_ROW:
        return None
    k = w_q.shape[1] * (2 if w_q.dtype == torch.uint8 else 1)
    bits = (8 if x_q.shape[-1] == k else 4, 4 if w_q.dtype == torch.uint8 else 8)
    m = x_q.numel() // x_q.shape[-1]
    return tables.rows(_of(x_q)[0], tables.linear_key("rows", m, width, k, *bits, 8, False))


def launch_rows(
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
) -> None:
    """Start `linear_rows_kernel`: `x` contiguous, at most `configs.MAX_ROW` wide; `out` in its container."""
    assert x.is_contiguous()
    width = w_q.shape[0]
    b_packed = w_q.dtype == torch.uint8
    k = w_q.shape[1] * (2 if b_packed else 1)
    a_packed = x_q.shape[-1] != k
    x_q = x_q.contiguous()
    m, ptx = x_q.numel() // x_q.shape[-1], _of(x_q)[2]
    linear_rows_kernel[(triton.cdiv(m, config.block_m),)](
        _bytes(x_q), _bytes(w_q), scale, column, bias if bias is not None else scale, x,
        norm_weight if norm_weight is not None else scale, norm_bias if norm_bias is not None else scale,
        table, _bytes(out), m, width, k, eps, inv_scale, float(zero_point),
        bias is not None, norm_weight is not None, norm_bias is not None, *codes,
        a_packed, b_packed, out.dtype == torch.uint8, k % config.block_k == 0, ptx,
        config.block_m, *configs.row_tiles(width), config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def linear_qkv(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    heads: int,
    out_inv_scale: Tensor,
    qk_bits: int,
    v_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_qkv`."""
    batch, tokens = x_q.shape[:2]
    head_dim = w_q.shape[0] // (3 * heads)
    q, k, v = _empty_heads(x_q, heads, head_dim)
    _launch_linear(
        linear_kernels.HEADS, x_q, w_q, scale, column, bias, q, k=k, v=v, step=out_inv_scale,
        layout=(batch, tokens, heads, head_dim), codes=reference.code_range(qk_bits),
        v_codes=reference.code_range(v_bits),
    )  # fmt: skip
    return q, k, v


def heads_quantize(
    qkv: Tensor,
    norm: bool,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    heads: int,
    out_inv_scale: Tensor,
    qk_bits: int,
    v_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.heads_quantize`; q and k both have a weight, or neither, and likewise a bias."""
    assert (q_weight is None, q_bias is None) == (k_weight is None, k_bias is None)
    qkv = qkv.contiguous()
    batch, tokens, columns = qkv.shape
    head_dim = columns // (3 * heads)
    q, k, v = _empty_heads(qkv, heads, head_dim)
    block_m, block_d = configs.heads_blocks(head_dim)
    padded = v.shape[-1]
    absent = out_inv_scale
    heads_kernel[(triton.cdiv(padded, block_m), batch * heads)](
        qkv, *(absent if t is None else t for t in (q_weight, q_bias, k_weight, k_bias)), out_inv_scale,
        q, k, v, tokens, padded, eps, norm, q_weight is not None, q_bias is not None,
        *reference.code_range(qk_bits), *reference.code_range(v_bits), heads, head_dim, _of(qkv)[2],
        block_m, block_d, num_warps=4,
    )  # fmt: skip
    return q, k, v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    v_scale: Tensor,
    p_bits: int,
    p_scheme: str,
    out_inv_scale: float,
    out_zero_point: int,
    out_bits: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """See `reference.attention`."""
    unit = reference.softmax_unit(p_bits, p_scheme)
    batch, heads, tokens, head_dim = q.shape
    out = _empty(q, (batch, tokens, heads * head_dim), dtype)
    arch, _, ptx = _of(q)
    config = configs.attention_config(tokens, head_dim, arch, p_scheme)
    floating = out_bits == reference.FLOAT_BITS
    attention_kernel[(triton.cdiv(tokens, config.block_m), batch * heads)](
        q, k, v, logit_scale, v_scale, table, _bytes(out), tokens, v.shape[-1], out_inv_scale, float(out_zero_point),
        heads, head_dim, p_bits, unit, p_scheme, *(FULL if floating else reference.code_range(out_bits)),
        floating, dtype == reference.INT4, ptx,
        config.block_m, max(32, triton.next_power_of_2(head_dim)), *config.tiles, config.on_chip,
        num_warps=config.warps, num_stages=config.stages, **configs.attention_options(arch),
    )  # fmt: skip
    return out
