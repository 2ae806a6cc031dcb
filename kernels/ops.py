"""The ops: one schema each, whatever the device. `torch.ops.lampq.<name>` is C++ or oneDNN on a CPU, Triton on a GPU.

`ops(backend)` gives the same names as plain functions: "native" dispatches by device, "reference" is `reference.py`,
"triton" is the GPU's launchers whatever the device (for Triton's interpreter).
Shapes and dtypes of every argument are in the docstrings of `reference.py`; a fake of each op here serves tracing
(torch.compile, export).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import impl as cpu

LIBRARY = torch.library.Library("lampq", "DEF")

_LINEAR = "Tensor x_q, Tensor w_q, Tensor scale, Tensor column, Tensor? bias"
_LEVELS = "Tensor? levels=None"
_HEADS = "int heads, Tensor out_inv_scale, int qk_bits, int v_bits"
_HEADS_OUT = "(Tensor, Tensor, Tensor)"
_CODES = "ScalarType dtype, Tensor? table=None"
_OUT = f"float out_inv_scale, int out_zero_point, int out_bits, {_CODES}"
_OUT_CHANNELS = f"Tensor out_inv_scale, Tensor out_offset, int out_bits, {_CODES}"

SCHEMAS = {
    "quantize": f"(Tensor x, float inv_scale, int zero_point, int bits, {_CODES}) -> Tensor",
    "quantize_channels": f"(Tensor x, Tensor inv_scale, Tensor offset, int bits, {_CODES}) -> Tensor",
    "layernorm_quantize": "(Tensor x, Tensor? weight, Tensor? bias, float eps, float inv_scale, int zero_point, "
    f"int bits, {_CODES}) -> Tensor",
    "linear_float": f"({_LINEAR}, str activation, ScalarType dtype, {_LEVELS}) -> Tensor",
    "linear_requant": f"({_LINEAR}, str activation, {_OUT}, {_LEVELS}) -> Tensor",
    "linear_requant_channels": f"({_LINEAR}, str activation, {_OUT_CHANNELS}, {_LEVELS}) -> Tensor",
    "linear_residual": f"(Tensor(a!) x, {_LINEAR}, {_LEVELS}) -> ()",
    "linear_residual_layernorm": f"(Tensor(a!) x, {_LINEAR}, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    f"float inv_scale, int zero_point, int bits, {_CODES}, {_LEVELS}) -> Tensor",
    "linear_qkv": f"({_LINEAR}, {_HEADS}, {_LEVELS}) -> {_HEADS_OUT}",
    "heads_quantize": "(Tensor qkv, bool norm, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, "
    f"float eps, {_HEADS}) -> {_HEADS_OUT}",
    "attention": "(Tensor q, Tensor k, Tensor v, Tensor logit_scale, Tensor v_scale, int p_bits, str p_scheme, "
    f"{_OUT}) -> Tensor",
}


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A result in its container: two codes a byte for int4."""
    if dtype == reference.INT4:
        return like.new_empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    return like.new_empty(shape, dtype=dtype)


def _dtype(args: Sequence[Any]) -> torch.dtype:
    """The container or dtype of the result: the last of an op's arguments but for tables and levels."""
    return next(a for a in reversed(args) if isinstance(a, torch.dtype))


def _fake_same(x: Tensor, *args: Any) -> Tensor:
    return _empty(x, x.shape, _dtype(args))


def _fake_linear(x_q: Tensor, w_q: Tensor, *args: Any) -> Tensor:
    return _empty(x_q, (*x_q.shape[:-1], w_q.shape[0]), _dtype(args))


def _fake_residual(x: Tensor, x_q: Tensor, w_q: Tensor, *args: Any) -> None:
    return None


def _fake_heads(x: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens = x.shape[0], x.shape[1]
    head_dim = width // (3 * heads)
    q = x.new_empty((batch, heads, tokens, head_dim), dtype=torch.int8)
    v = x.new_empty((batch, heads, head_dim, reference.padded_tokens(tokens)), dtype=torch.int8)
    return q, torch.empty_like(q), v


def _fake_qkv(
    x_q: Tensor, w_q: Tensor, scale: Tensor, column: Tensor, bias: Tensor | None, heads: int, *args: Any
) -> Any:
    return _fake_heads(x_q, heads, w_q.shape[0])


def _fake_heads_quantize(
    qkv: Tensor, norm: bool, qw: Any, qb: Any, kw: Any, kb: Any, eps: float, heads: int, *args: Any
) -> Any:
    return _fake_heads(qkv, heads, qkv.shape[-1])


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    batch, heads, tokens, head_dim = q.shape
    return _empty(q, (batch, tokens, heads * head_dim), _dtype(args))


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize": _fake_same,
    "quantize_channels": _fake_same,
    "layernorm_quantize": _fake_same,
    "linear_float": _fake_linear,
    "linear_requant": _fake_linear,
    "linear_requant_channels": _fake_linear,
    "linear_residual": _fake_residual,
    "linear_residual_layernorm": _fake_same,
    "linear_qkv": _fake_qkv,
    "heads_quantize": _fake_heads_quantize,
    "attention": _fake_attention,
}


def _on_gpu(name: str) -> Callable[..., Any]:
    """The Triton launcher of that name; Triton is imported by the first call, not by importing this package.

    Every op's first argument is a tensor. Triton starts kernels on the current device, wherever their arguments lie.
    """

    def launch(*args: Any, **kwargs: Any) -> Any:
        from lampq_rt.kernels.gpu import impl

        call, device = getattr(impl, name), args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return call(*args, **kwargs)
        with torch.cuda.device(device):
            return call(*args, **kwargs)

    return launch


def _define() -> SimpleNamespace:
    for name, schema in SCHEMAS.items():
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, getattr(cpu, name), "CPU")
        LIBRARY.impl(name, _on_gpu(name), "CUDA")
        torch.library.register_fake(f"lampq::{name}", _FAKES[name], lib=LIBRARY)
    return SimpleNamespace(**{name: getattr(torch.ops.lampq, name).default for name in SCHEMAS})


NATIVE = _define()
REFERENCE = SimpleNamespace(**{name: getattr(reference, name) for name in SCHEMAS})
TRITON = SimpleNamespace(**{name: _on_gpu(name) for name in SCHEMAS})


def ops(backend: str) -> SimpleNamespace:
    """The ops of `backend`, "native", "reference" or "triton", as functions called by the names in `SCHEMAS`."""
    return {"native": NATIVE, "reference": REFERENCE, "triton": TRITON}[backend]
