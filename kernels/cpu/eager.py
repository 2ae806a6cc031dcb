"""What lies between the int8 matmuls, in eager torch, for machines without a C++ compiler: same codes, more passes."""

from __future__ import annotations

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu.machine import has_vnni


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 [M, K] @ [K, N] of int8 codes."""
    if has_vnni():
        return torch._int_mm(a, b)
    return (a.float() @ b.float()).to(torch.int32)  # exact: |sum| < 2^24 for the lengths of one head


def split_heads(qkv: Tensor, heads: int, qk_bits: int, v_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `native.split_heads`."""
    q, k, v = reference.split_heads(qkv, heads)
    if qk_bits < 8:
        q, k = (t.clamp_(*reference.code_range(qk_bits)) for t in (q, k))
    return q, k, reference.transpose_v(v.clamp_(*reference.code_range(v_bits)))


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
    """See `reference.attention`; one integer matmul per image and head, for log2 codes one in fp64, exact as well."""
    batch, heads, tokens, head_dim = q.shape
    unit = reference.softmax_unit(p_bits, p_scheme)
    half = (int(unit) + 1) // 2
    y = torch.empty((batch, tokens, heads, head_dim), dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            logits = _matmul(q[b, h], k[b, h].t()).float() * logit_scale[h]
            shifted = logits.sub_(logits.amax(-1, keepdim=True))
            e = torch.exp2(shifted)
            weights = reference.softmax_weights(shifted, e, p_bits, p_scheme)
            values = v[b, h, :, :tokens].t()
            if p_scheme == "log2":
                acc = weights.double() @ values.double()
            else:
                p_q = weights.sub_(half).to(torch.int8)
                acc = _matmul(p_q, values) + half * values.to(torch.int32).sum(0, dtype=torch.int32)
            y[b, :, h] = acc.float() * (v_scale[h] / (unit * e.sum(-1, keepdim=True)))
    flat = y.flatten(2)
    if out_bits == reference.FLOAT_BITS:
        return flat.to(dtype)
    return reference.quantize(flat, out_inv_scale, out_zero_point, out_bits, dtype, table)
