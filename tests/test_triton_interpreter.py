"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference.

`TRITON_INTERPRET` is read when a kernel is decorated, so these tests are a pytest process of their own (`make test`
starts it); in any other they are skipped. `triton_cases.py` has what is run; `test_triton_compile.py` compiles the
same, because the interpreter accepts more than the compiler.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt.kernels import reference
from lampq_rt.kernels.ops import TRITON
from lampq_rt.plan import Plan
from tests import triton_cases as cases

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1, in its own process"
    ),
]


def assert_codes(came: Tensor, wanted: Tensor, rate: float = 1e-3) -> None:
    """At most one code apart and rarely; packed containers are unpacked first."""
    assert came.dtype == wanted.dtype and came.shape == wanted.shape
    if came.dtype == torch.uint8:
        came, wanted = reference.unpack_int4(came), reference.unpack_int4(wanted)
    difference = (came.int() - wanted.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= rate


def both(case: cases.Case) -> tuple[Any, Any]:
    """What the kernel and the reference answer."""
    name, args = case
    return getattr(TRITON, name)(*args), getattr(reference, name)(*args)


@pytest.mark.parametrize(("bits", "dtype"), cases.QUANTIZE)
def test_quantize_and_layernorm(bits: int, dtype: torch.dtype) -> None:
    for case in cases.quantize_cases(bits, dtype):
        came, wanted = both(case)
        assert_codes(came, wanted, 0.0 if case[0] == "quantize" else 1e-3)


@pytest.mark.parametrize("shape", cases.LINEARS)
@pytest.mark.parametrize("a_bits", cases.A_BITS)
@pytest.mark.parametrize("w_bits", cases.W_BITS)
def test_linears(shape: tuple[int, int, int], a_bits: int, w_bits: int) -> None:
    for name, args in cases.linear_cases(shape, a_bits, w_bits):
        if name == "linear_requant":
            assert_codes(*both((name, args)), 2e-2)
        elif name == "linear_float":
            torch.testing.assert_close(*both((name, args)), rtol=1e-3, atol=1e-3)
        else:
            came, wanted = args[0].clone(), args[0].clone()
            TRITON.linear_residual(came, *args[1:])
            reference.linear_residual(wanted, *args[1:])
            torch.testing.assert_close(came, wanted, rtol=1e-3, atol=1e-3)


def test_split_k_gives_the_exact_sum_and_cleans_up() -> None:
    from lampq_rt.kernels.gpu import impl
    from lampq_rt.kernels.gpu.configs import LinearConfig
    from lampq_rt.kernels.gpu.linear import FLOAT

    case = cases.linear_case((70, 768, 192), 8, 8)
    wanted = reference.linear_float(*case, "none", torch.float32)
    for split in cases.SPLITS:
        out = torch.full((1, 70, 192), float("nan"))
        impl._launch_linear(FLOAT, *case, out, config=LinearConfig(64, 64, 128, split_k=split, warps=4))
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", cases.QKV)
@pytest.mark.parametrize("bits", cases.QKV_BITS)
def test_linear_qkv(case: tuple[int, int, int, int], bits: tuple[int, int]) -> None:
    for came, wanted in zip(*both(cases.qkv_case(case, bits)), strict=True):
        assert_codes(came, wanted)


@pytest.mark.parametrize(("tokens", "head_dim"), cases.ATTENTION)
def test_attention(tokens: int, head_dim: int) -> None:
    *coded, floating = cases.attention_cases(tokens, head_dim)
    for case in coded:
        assert_codes(*both(case))
    came, wanted = both(floating)
    # A code of P that falls the other way moves a whole row by 1/255 of a value: compare the spread, not each number.
    assert (came - wanted).pow(2).mean().sqrt() <= 1e-4 * wanted.pow(2).mean().sqrt()


def assert_model(model: nn.Module, plan: Plan, images: Tensor) -> None:
    """The kernels' logits are nearer to the reference's than half of what quantisation changes."""
    with torch.inference_mode():
        wanted = lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan, backend="triton")(images)
        noise = (wanted - model(images)).pow(2).mean().sqrt()
    assert (came - wanted).pow(2).mean().sqrt() <= 0.5 * noise


@pytest.mark.parametrize(("bits", "input_bits"), cases.MODELS)
def test_a_whole_model_runs_on_the_triton_path(bits: cases.Bits, input_bits: int | None) -> None:
    assert_model(*cases.model_case(bits, input_bits))


def test_one_deit_tiny_block_at_197_tokens() -> None:
    assert_model(*cases.deit_block())
