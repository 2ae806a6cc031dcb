"""The CUDA implementation of every op in `kernels/ops.py`, by the same names; `reference.py` says what each computes.

Launchers only: they compute sizes, choose a configuration and start one kernel. With TRITON_INTERPRET=1 they run on
CPU tensors too, which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.gpu import configs, start
from lampq_rt.kernels.gpu import linear as linear_kernels
from lampq_rt.kernels.gpu.attention import attention_kernel
from lampq_rt.kernels.gpu.heads import heads_kernel
from lampq_rt.kernels.gpu.layernorm import quantize_kernel
from lampq_rt.kernels.gpu.start import architecture as architecture


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
        x, start.as_bytes(out), *channels, table, x.numel(), x.shape[-1], inv_scale, float(zero_point), by_channel,
        low, high, dtype == reference.INT4, start.facts(x)[2], block,
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
    out = _empty(x, tuple(x.shape), dtype)
    start.layernorm(x, out, weight, bias, eps, inv_scale, zero_point, reference.code_range(bits), table)
    return out


def linear_float(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_float`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    gelu = activation == "gelu"
    start.linear(linear_kernels.FLOAT, x_q, w_q, scale, column, bias, out, gelu=gelu, levels=levels)
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
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    start.linear(
        linear_kernels.REQUANT, x_q, w_q, scale, column, bias, out, gelu=activation == "gelu", table=table,
        levels=levels, inv_scale=out_inv_scale, zero_point=out_zero_point, codes=reference.code_range(out_bits),
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
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_requant_channels`; tuned as `linear_requant`."""
    out = _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), dtype)
    start.linear(
        linear_kernels.REQUANT, x_q, w_q, scale, column, bias, out, gelu=activation == "gelu", table=table,
        levels=levels, step=out_inv_scale, offset=out_offset, codes=reference.code_range(out_bits),
        out_packed=dtype == reference.INT4,
    )  # fmt: skip
    return out


def linear_residual(
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
) -> None:
    """See `reference.linear_residual`; `x` contiguous."""
    assert x.is_contiguous()
    start.linear(linear_kernels.RESIDUAL, x_q, w_q, scale, column, bias, x, levels=levels)


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
    levels: Tensor | None = None,
) -> Tensor:
    """See `reference.linear_residual_layernorm`; one kernel where a tuned table prefers it, else two."""
    config = start.rows_config(x_q, w_q)
    if config is None:
        linear_residual(x, x_q, w_q, scale, column, bias, levels)
        return layernorm_quantize(x, norm_weight, norm_bias, eps, inv_scale, zero_point, bits, dtype, table)
    out = _empty(x, tuple(x.shape), dtype)
    norm = (norm_weight, norm_bias, eps, inv_scale, zero_point)
    start.rows(config, x, x_q, w_q, scale, column, bias, out, *norm, reference.code_range(bits), table, levels)
    return out


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
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_qkv`."""
    batch, tokens = x_q.shape[:2]
    head_dim = w_q.shape[0] // (3 * heads)
    q, k, v = _empty_heads(x_q, heads, head_dim)
    start.linear(
        linear_kernels.HEADS, x_q, w_q, scale, column, bias, q, k=k, v=v, step=out_inv_scale,
        layout=(batch, tokens, heads, head_dim), codes=reference.code_range(qk_bits),
        v_codes=reference.code_range(v_bits), levels=levels,
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
    heads_kernel[(triton.cdiv(padded, block_m), heads, batch)](
        qkv, *(absent if t is None else t for t in (q_weight, q_bias, k_weight, k_bias)), out_inv_scale,
        q, k, v, tokens, padded, eps, norm, q_weight is not None, q_bias is not None,
        *reference.code_range(qk_bits), *reference.code_range(v_bits), heads, head_dim, start.facts(qkv)[2],
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
    arch, _, ptx = start.facts(q)
    config = configs.attention_config(tokens, head_dim, arch, p_scheme)
    floating = out_bits == reference.FLOAT_BITS
    attention_kernel[(triton.cdiv(tokens, config.block_m), heads, batch)](
        q, k, v, logit_scale, v_scale, table, start.as_bytes(out), tokens, v.shape[-1],
        out_inv_scale, float(out_zero_point), heads, head_dim, p_bits, unit, p_scheme,
        *(start.FULL if floating else reference.code_range(out_bits)),
        floating, dtype == reference.INT4, ptx,
        config.block_m, max(32, triton.next_power_of_2(head_dim)), *config.tiles, config.on_chip,
        num_warps=config.warps, num_stages=config.stages, **configs.attention_options(arch),
    )  # fmt: skip
    return out
