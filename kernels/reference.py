"""The truth: every op of `kernels/ops.py` in plain torch, slow and exact. Fast paths must meet it (docs/numerics.md).

`containers.py`, whose names are given out here, says how codes lie in memory. Matrix products run in fp64, where every
sum of products of codes is exact. An op that reads a packed weight takes `levels` as its last argument, int8 [16] where
the weight's codes name levels from a table (`dense_weight`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lampq_rt.kernels.containers import INT4 as INT4
from lampq_rt.kernels.containers import LEVELS as LEVELS
from lampq_rt.kernels.containers import NIBBLE_GROUP as NIBBLE_GROUP
from lampq_rt.kernels.containers import OFFSET as OFFSET
from lampq_rt.kernels.containers import column_constant as column_constant
from lampq_rt.kernels.containers import dense_weight as dense_weight
from lampq_rt.kernels.containers import load_codes as load_codes
from lampq_rt.kernels.containers import pack_int4 as pack_int4
from lampq_rt.kernels.containers import store_codes as store_codes
from lampq_rt.kernels.containers import unpack_int4 as unpack_int4

FLOAT_BITS = 16
"""`out_bits` that asks for a floating-point result."""

SOFTMAX_BITS = {"rowmax": 8, "log2": 4, "cubic": 7}
"""Schemes of P and the widest codes of each: 2^0 ... 2^-15 of "log2" and an int8 v are exact in fp16, and weights of
"cubic" lie on a grid of 8 bits."""

TOKEN_PAD = 16
"""Rows of v^T are padded with zeros to a multiple of this many tokens."""


def code_range(bits: int, *, weight: bool = False) -> tuple[int, int]:
    """Smallest and largest signed code; weights leave out -128 (rule 2)."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return (low + 1, high) if weight and bits == 8 else (low, high)


def round_codes(x: Tensor, inv_scale: Tensor | float, zero_point: Tensor | float, low: int, high: int) -> Tensor:
    """clamp(rne(x * inv_scale + zero_point)) as fp32; the sum is rounded to fp32 before rne (rule 1)."""
    return (x * inv_scale).add_(zero_point).round_().clamp_(low, high)


def matmul_codes(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 product of integer matrices [..., M, K] @ [..., K, N]."""
    return (a.double() @ b.double()).to(torch.int32)


def padded_tokens(tokens: int) -> int:
    """Columns of v^T for that many tokens."""
    return (tokens + TOKEN_PAD - 1) // TOKEN_PAD * TOKEN_PAD


def quantize(
    x: Tensor, inv_scale: float, zero_point: int, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """Codes of floating-point `x`, same shape; computed in fp32 (rule 1).

    Here and in every op that makes codes for a linear, `table` is int8 [256] where the linear's input has levels from
    a table (docs/numerics.md, "Tables"): then levels leave, as `remap` makes them of the codes, in the int8 or uint8
    container.
    """
    assert table is None or dtype != INT4
    return remap(store_codes(round_codes(x.float(), inv_scale, zero_point, *code_range(bits)), dtype), table)


def quantize_channels(
    x: Tensor, inv_scale: Tensor, offset: Tensor, bits: int, dtype: torch.dtype, table: Tensor | None = None
) -> Tensor:
    """`quantize` with a step and an offset a channel (docs/numerics.md, "Steps by channel").

    Args:
        x: floating point [..., K].
        inv_scale: fp32 [K], 1/step of each channel.
        offset: fp32 [K], the zero-point of each channel; any real number.
        bits: 2..8.
        dtype: container of the codes [..., K].
        table: see `quantize`.
    """
    assert table is None or dtype != INT4
    return remap(store_codes(round_codes(x.float(), inv_scale, offset, *code_range(bits)), dtype), table)


def remap(codes: Tensor, table: Tensor | None) -> Tensor:
    """`codes`, each become its level, in place: table[code + 128]; as they are without a table.

    Args:
        codes: int8 or uint8 container, any shape; never int4.
        table: int8 [256], levels by signed code from -128 on.
    """
    if table is None:
        return codes
    return codes.copy_(store_codes(table[(load_codes(codes) + OFFSET).long()].to(torch.int32), codes.dtype))


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
    """Codes of LayerNorm(x) over the last dimension, statistics in fp32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return quantize(normed, inv_scale, zero_point, bits, dtype, table)


def accumulate(x_q: Tensor, w_q: Tensor, column: Tensor, levels: Tensor | None = None) -> Tensor:
    """int32 [..., N]: x_q @ w_q^T plus the column constant (rules 3 and 4)."""
    weight = dense_weight(w_q, levels)
    return matmul_codes(load_codes(x_q, weight.shape[1]), weight.t()) + column


def linear(
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    levels: Tensor | None = None,
) -> Tensor:
    """fp32 [..., N]: the dequantised product, bias, and "gelu" (erf form) or "none" (rules 5 and 6)."""
    y = accumulate(x_q, w_q, column, levels).float() * scale
    if bias is not None:
        y = y + bias
    return F.gelu(y) if activation == "gelu" else y


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
    """`linear` in `dtype`, [..., N].

    Args:
        x_q: codes: int8 or uint8 container [..., K], or int4, that is uint8 [..., K/2].
        w_q: int8 [N, K], or uint8 [N, K/2] packed.
        scale: fp32 [N], step of the input times those of the weight.
        column: int32 [N], see `column_constant`.
        bias: fp32 [N] or None.
        activation: "gelu" (erf form) or "none".
        dtype: fp32, fp16 or bf16.
        levels: int8 [16] where the codes of a packed weight name levels, or None.
    """
    return linear(x_q, w_q, scale, column, bias, activation, levels).to(dtype)


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
    """Codes of `linear`, [..., N]."""
    y = linear(x_q, w_q, scale, column, bias, activation, levels)
    return quantize(y, out_inv_scale, out_zero_point, out_bits, dtype, table)


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
    """Codes of `linear`, [..., N], each output channel with its own step: `quantize_channels` says how."""
    y = linear(x_q, w_q, scale, column, bias, activation, levels)
    return quantize_channels(y, out_inv_scale, out_offset, out_bits, dtype, table)


def linear_residual(
    x: Tensor,
    x_q: Tensor,
    w_q: Tensor,
    scale: Tensor,
    column: Tensor,
    bias: Tensor | None,
    levels: Tensor | None = None,
) -> None:
    """x += `linear`, in place; the sum is formed in fp32 and rounded once to x's dtype."""
    x.copy_(x.float() + linear(x_q, w_q, scale, column, bias, levels=levels))


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
    """`linear_residual`, then codes [..., N] in container `dtype`: `layernorm_quantize` of the new x.

    Args:
        x: the residual stream, fp32, fp16 or bf16 [..., N]; changed in place.
        x_q, w_q, scale, column, bias, levels: of the linear, as in `linear_float`.
        norm_weight, norm_bias: of the LayerNorm, floating point [N] or None; `eps` its number.
        inv_scale, zero_point, bits, dtype, table: of the codes, numbers and int8 [256] or None, as in `quantize`.
    """
    linear_residual(x, x_q, w_q, scale, column, bias, levels)
    return layernorm_quantize(x, norm_weight, norm_bias, eps, inv_scale, zero_point, bits, dtype, table)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*H*d] to q, k, v of shape [B, H, N, d], contiguous."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return q, k, v


def transpose_v(v: Tensor) -> Tensor:
    """[B, H, N, d] to [B, H, d, N_pad], zero in the padding."""
    return F.pad(v.transpose(-2, -1), (0, padded_tokens(v.shape[-2]) - v.shape[-2])).contiguous()


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
    """q and k int8 [B, H, N, d], v int8 [B, H, d, N_pad]; `out_inv_scale` is fp32 [3*H*d], constant over a head."""
    qkv = linear(x_q, w_q, scale, column, bias, levels=levels)
    return _quantize_heads(*split_heads(qkv, heads), out_inv_scale, qk_bits, v_bits)


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
    """Codes as `linear_qkv` gives them, of fp `qkv` [B, N, 3*H*d]; `norm` asks for LayerNorm of q and k first."""
    q, k, v = split_heads(qkv.float(), heads)
    if norm:
        q = F.layer_norm(q, q.shape[-1:], q_weight, q_bias, eps)
        k = F.layer_norm(k, k.shape[-1:], k_weight, k_bias, eps)
    return _quantize_heads(q, k, v, out_inv_scale, qk_bits, v_bits)


def _quantize_heads(
    q: Tensor, k: Tensor, v: Tensor, out_inv_scale: Tensor, qk_bits: int, v_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    heads, head_dim = q.shape[1], q.shape[-1]
    steps = out_inv_scale.view(3, heads, 1, head_dim)
    q_q, k_q, v_q = (
        round_codes(t, step, 0.0, *code_range(bits)).to(torch.int8)
        for t, step, bits in ((q, steps[0], qk_bits), (k, steps[1], qk_bits), (v, steps[2], v_bits))
    )
    return q_q, k_q, transpose_v(v_q)


def softmax_unit(p_bits: int, p_scheme: str) -> float:
    """What the weight 1 becomes in the integers that multiply v: "rowmax" 2^b-1, "log2" 2^(2^b-1), "cubic" 2^8-1.

    Raises:
        ValueError: unknown scheme, or more bits than it has.
    """
    if p_scheme not in SOFTMAX_BITS:
        raise ValueError(f"softmax codes of scheme {p_scheme!r}; allowed: {', '.join(SOFTMAX_BITS)}")
    if p_bits > SOFTMAX_BITS[p_scheme]:
        raise ValueError(f"{p_scheme} softmax codes of {p_bits} bits; allowed: at most {SOFTMAX_BITS[p_scheme]}")
    if p_scheme == "log2":
        return float(1 << ((1 << p_bits) - 1))
    return float((1 << (8 if p_scheme == "cubic" else p_bits)) - 1)


def softmax_weights(shifted: Tensor, e: Tensor, p_bits: int, p_scheme: str) -> Tensor:
    """fp32 integers that multiply v, in units of 1 / `softmax_unit` (rule 7).

    "log2": code = rne(-log2 e), weight 2^-code, and 0 where the code is 2^b or more. The logit below its row's maximum
    is log2 e, so no logarithm is taken and every backend gets the same code. "cubic": the code is of e^(1/3), the
    weight its cube, see `cube_weights`.

    Args:
        shifted: logits in powers of two less their row's maximum, fp32.
        e: exp2(shifted).
        p_bits: bits of a code.
        p_scheme: of `SOFTMAX_BITS`.
    """
    unit = softmax_unit(p_bits, p_scheme)
    if p_scheme == "rowmax":
        return (e * unit).round()
    if p_scheme == "cubic":
        top = (1 << p_bits) - 1
        return cube_weights((torch.exp2(shifted * (1 / 3)) * top).round(), top)
    code = shifted.neg().round()
    return torch.where(code < 1 << p_bits, unit * torch.exp2(-code), 0.0)


def cube_weights(codes: Tensor, top: int) -> Tensor:
    """fp32 rne(code^3 * (255 / top^3)), 0..255, of fp32 codes 0..top; the cube is exact, its factor rounded to fp32."""
    return (codes * codes).mul_(codes).mul_(255 / top**3).round_()


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
    """softmax(QK^T)V on codes, requantised (rule 7).

    Args:
        q: int8 [B, H, N, d].
        k: int8 [B, H, N, d].
        v: int8 [B, H, d, N_pad], zero in the padding.
        logit_scale: fp32 [H], q_scale * k_scale * log2(e) / sqrt(d).
        v_scale: fp32 [H].
        p_bits: bits of the codes of the unnormalised softmax.
        p_scheme: what those codes mean, see `softmax_weights`.
        out_inv_scale: 1/step of the result's codes; ignored for `out_bits` = 16.
        out_zero_point: of the signed code.
        out_bits: 2..8 for codes, 16 for floating point.
        dtype: container of the codes, or the floating-point dtype.
        table: see `quantize`; ignored for floating point.

    Returns:
        [B, N, H*d] in `dtype`.

    Raises:
        ValueError: see `softmax_unit`.
    """
    unit = softmax_unit(p_bits, p_scheme)
    tokens = q.shape[-2]
    logits = matmul_codes(q, k.transpose(-2, -1)).float() * logit_scale.view(-1, 1, 1)
    shifted = logits - logits.amax(-1, keepdim=True)
    e = torch.exp2(shifted)
    weights = softmax_weights(shifted, e, p_bits, p_scheme)
    acc = (weights.double() @ v[..., :tokens].transpose(-2, -1).double()).float()  # exact, rounded once
    y = acc * (v_scale.view(-1, 1, 1) / (unit * e.sum(-1, keepdim=True)))
    y = y.transpose(1, 2).flatten(2)
    if out_bits == FLOAT_BITS:
        return y.to(dtype)
    return quantize(y, out_inv_scale, out_zero_point, out_bits, dtype, table)


def logit_scale(q_scale: Tensor, k_scale: Tensor, head_dim: int) -> Tensor:
    """fp32 [H]: what turns int32 logits of a head into powers of two."""
    return (q_scale.double() * k_scale.double() * (math.log2(math.e) / math.sqrt(head_dim))).float()
