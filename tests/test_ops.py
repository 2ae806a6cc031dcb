"""Every op's CPU path against the reference, each fed the same inputs (docs/numerics.md, rule 8)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import eager, impl, linear, machine, native, prepack
from lampq_rt.kernels.ops import NATIVE, REFERENCE, SCHEMAS

CONTAINERS = (torch.int8, torch.uint8)
HEADS = [
    (2, 197, 3, 64),
    (1, 198, 2, 32),
    (2, 49, 2, 48),
    (1, 577, 1, 72),
    (2, 5, 1, 80),
    (1, 16, 1, 96),
    (1, 33, 1, 128),
    (1, 65, 2, 64),
    (3, 1, 2, 8),
]

SOFTMAX = [(2, "rowmax"), (4, "rowmax"), (8, "rowmax"), (2, "log2"), (3, "log2"), (4, "log2")]
SOFTMAX += [(bits, "cubic") for bits in range(2, 8)]


def assert_codes(came: Tensor, wanted: Tensor, rate: float = 1e-3) -> None:
    """At most one code apart, and in fewer than `rate` of all places."""
    assert came.dtype == wanted.dtype and came.shape == wanted.shape
    difference = (reference.load_codes(came) - reference.load_codes(wanted)).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= rate


def linear_case(m: int, k: int, n: int, bits: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """Codes, weight (int8), scale (some negative, as LayerScale makes them), column constant and bias."""
    generator = torch.Generator().manual_seed(seed)
    x_q = torch.randint(0, 256, (2, m, k), dtype=torch.uint8, generator=generator)
    low, high = reference.code_range(bits, weight=True)
    w_q = torch.randint(low, high + 1, (n, k), dtype=torch.int8, generator=generator)
    scale = (torch.rand(n, generator=generator) + 0.2) * 10 / (high * math.sqrt(k) * 74)
    scale[::3] *= -1
    bias = torch.randn(n, generator=generator)
    return x_q, w_q, scale, reference.column_constant(w_q, -23), bias


@pytest.mark.parametrize("dtype", CONTAINERS)
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_quantize_is_exact_also_on_ties_and_beyond_the_range(bits: int, dtype: torch.dtype) -> None:
    ties = torch.arange(-140, 141) + 0.5
    edges = torch.tensor([127.6, -128.5, 127.5, -127.5, 1e30, -1e30, 0.0, -0.0, 0.49999997])
    x = torch.cat([ties, edges, torch.randn(70_001) * 60])
    for inv_scale, zero_point in ((1.0, 0), (float(torch.tensor(1 / 0.03)), -7)):
        args = (x, inv_scale, zero_point, bits, dtype)
        assert torch.equal(NATIVE.quantize(*args), REFERENCE.quantize(*args))


@pytest.mark.parametrize("dtype", [*CONTAINERS, reference.INT4])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_quantize_by_channel_is_exact_also_on_ties_and_beyond_the_range(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    ties, offset = torch.arange(-140, 141)[:, None] + 0.5, torch.randint(-30, 30, (64,)).float()
    inv_scale = 2.0 ** torch.randint(-3, 4, (64,))
    bits = min(bits, 4) if dtype == reference.INT4 else bits
    for x, real in ((ties / inv_scale, 0.0), (torch.randn(3, 67, 64) * 60, 0.25), (torch.randn(5, 64).half(), -1e30)):
        args = (x, inv_scale, offset + real, bits, dtype)
        assert torch.equal(NATIVE.quantize_channels(*args), REFERENCE.quantize_channels(*args))
    same = (torch.full((64,), 3.0), torch.full((64,), -7.0), bits, dtype)  # equal channels are one step for all
    assert torch.equal(NATIVE.quantize_channels(x, *same), REFERENCE.quantize(x, 3.0, -7, bits, dtype))


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.6, 400.0, -128.5, -400.0])
    expected = torch.tensor([0, 2, 2, 0, -2, 127, 127, -128, -128], dtype=torch.int8)
    assert torch.equal(NATIVE.quantize(x, 1.0, 0, 8, torch.int8), expected)
    assert torch.equal(NATIVE.quantize(x, 1.0, 0, 8, torch.uint8), (expected.int() + 128).to(torch.uint8))


@pytest.mark.parametrize("dtype", CONTAINERS)
@pytest.mark.parametrize("width", [1, 63, 64, 192, 1000])
@pytest.mark.parametrize("affine", [True, False])
def test_layernorm_quantize(width: int, affine: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x = torch.randn(3, 67, width) * 5 + 2
    x[0, 0] = 3.0  # a constant row has no spread: only eps is left
    weight, bias = (torch.randn(width), torch.randn(width)) if affine else (None, None)
    for bits in (8, 4):
        args = (x, weight, bias, 1e-6, 21.0, 5, bits, dtype)
        assert_codes(NATIVE.layernorm_quantize(*args), REFERENCE.layernorm_quantize(*args))


def test_layernorm_quantize_of_a_view_with_strides() -> None:
    x = torch.randn(4, 64, 10).transpose(1, 2)
    args = (x, None, None, 1e-6, 30.0, 0, 8, torch.uint8)
    assert_codes(NATIVE.layernorm_quantize(*args), REFERENCE.layernorm_quantize(*args))


@pytest.fixture(params=["linear.cpp", "onednn"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products of codes the CPU ops use."""
    if request.param == "onednn":
        monkeypatch.setattr(linear, "serves", lambda w_q: False)
    elif not (machine.has_vnni() and native.has_products()):
        pytest.skip("linear.cpp needs AVX512-VNNI and a C++ compiler")
    return str(request.param)


@pytest.mark.parametrize(
    "shape", [(197, 192, 576), (198, 768, 192), (49, 64, 1000), (1, 64, 10), (3, 128, 65), (7, 588, 64), (5, 66, 130)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_linears(shape: tuple[int, int, int], packed: bool, products: str) -> None:
    if packed and shape[1] % 64:
        pytest.skip("two codes a byte need rows of a multiple of 64")
    x_q, w_q, scale, column, bias = linear_case(*shape, bits=4 if packed else 8)
    stored = reference.pack_int4(w_q) if packed else w_q
    exact = products == "linear.cpp" and linear.serves(stored)
    channels = (torch.rand(shape[2]) * 60 + 1, torch.randn(shape[2]) * 20)
    for b in (bias, None):
        args = (x_q, stored, scale, column, b)
        for activation, rate in (("none", 0.0 if exact else 1e-3), ("gelu", 1e-3 if exact else 2e-2)):
            for bits in (8, 5, 4):
                for dtype in CONTAINERS:
                    one = (*args, activation, 30.0, -9, bits, dtype)
                    assert_codes(NATIVE.linear_requant(*one), REFERENCE.linear_requant(*one), rate)
                    each = (*args, activation, *channels, bits, dtype)
                    assert_codes(NATIVE.linear_requant_channels(*each), REFERENCE.linear_requant_channels(*each), rate)
            came = NATIVE.linear_float(*args, activation, torch.float32)
            torch.testing.assert_close(
                came, REFERENCE.linear_float(*args, activation, torch.float32), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("tokens", [1, 3, 13, 197, 400])
def test_a_residual_with_its_layernorm(tokens: int, products: str) -> None:
    """From less than a tile of rows to more than a chunk, whatever the share of a thread."""
    case = linear_case(tokens, 384, 192)
    weight, bias = torch.randn(192), torch.randn(192)
    for norm in ((weight, bias), (weight, None), (None, None)):
        for bits, dtype in ((8, torch.uint8), (4, torch.int8)):
            start = torch.randn(2, tokens, 192)
            came, wanted = start.clone(), start.clone()
            tail = (*norm, 1e-6, 20.0, 3, bits, dtype)
            codes = NATIVE.linear_residual_layernorm(came, *case, *tail)
            assert_codes(codes, REFERENCE.linear_residual_layernorm(wanted, *case, *tail), 2e-3)
            torch.testing.assert_close(came, wanted, rtol=1e-5, atol=1e-5)


def test_gelu_far_from_zero(products: str) -> None:
    x_q = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 64).contiguous()
    w_q = torch.zeros(16, 64, dtype=torch.int8)
    w_q[:, 0] = 1
    scale = torch.logspace(-6, 30, 16)
    args = (x_q, w_q, scale, torch.zeros(16, dtype=torch.int32), None, "gelu", torch.float32)
    torch.testing.assert_close(NATIVE.linear_float(*args), REFERENCE.linear_float(*args), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_added_in_place(dtype: torch.dtype, products: str) -> None:
    case = linear_case(197, 192, 192)
    start = torch.randn(2, 197, 192, dtype=dtype)
    came, wanted = start.clone(), start.clone()
    address = came.data_ptr()
    assert NATIVE.linear_residual(came, *case) is None
    REFERENCE.linear_residual(wanted, *case)
    assert came.data_ptr() == address
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(came, wanted, rtol=tolerance, atol=tolerance)


def test_accumulators_equal_int64_products_at_the_extremes(products: str) -> None:
    x_q = torch.full((1, 2, 3072), 255, dtype=torch.uint8)
    x_q[0, 1] = 0
    w_q = torch.full((64, 3072), 127, dtype=torch.int8)
    w_q[::2] = -127
    ones, column = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    came = NATIVE.linear_float(x_q, w_q, ones, column, None, "none", torch.float32)
    exact = (x_q.long() - 128) @ w_q.long().t()
    assert torch.equal(came, exact.float())


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_linear_qkv_splits_heads_and_clears_the_padding(case: tuple[int, ...], bits: tuple[int, int]) -> None:
    batch, tokens, heads, head_dim = case
    width = heads * head_dim
    x_q, w_q, scale, column, bias = linear_case(tokens, width, 3 * width)
    x_q = x_q[:1].expand(batch, -1, -1).contiguous()
    steps = (torch.rand(3 * heads) * 20 + 20).repeat_interleave(head_dim)
    args = (x_q, w_q, scale, column, bias, heads, steps, *bits)
    for came, wanted in zip(NATIVE.linear_qkv(*args), REFERENCE.linear_qkv(*args), strict=True):
        assert_codes(came, wanted)
    v = NATIVE.linear_qkv(*args)[2]
    assert v.shape[-1] % 16 == 0 and not v[..., tokens:].any()


def attention_case(batch: int, tokens: int, heads: int, head_dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randint(-128, 128, (batch, heads, tokens, head_dim), dtype=torch.int8, generator=generator)
        for _ in range(3)
    )
    logit_scale = torch.rand(heads, generator=generator) * 3e-3 / math.sqrt(head_dim / 64) + 1e-5
    return q, k, reference.transpose_v(v), logit_scale, torch.rand(heads, generator=generator) + 0.1


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("p", SOFTMAX, ids=lambda p: f"{p[1]}{p[0]}")
@pytest.mark.parametrize("path", ["native", "eager"])
def test_attention(case: tuple[int, ...], p: tuple[int, str], path: str) -> None:
    attention = {"native": NATIVE.attention, "eager": eager.attention}[path]
    q, k, v, logit_scale, v_scale = attention_case(*case)
    for bits, dtype in ((8, torch.uint8), (4, torch.int8)):
        args = (q, k, v, logit_scale, v_scale, *p, 3.0, -4, bits, dtype)
        assert_codes(attention(*args), REFERENCE.attention(*args))
    args = (q, k, v, logit_scale, v_scale, *p, 1.0, 0, 16, torch.float32)
    # No exponential enters a log2 code, so all are equal, and so are the sums.
    tolerance = {"rtol": 1e-6, "atol": 0.0} if p[1] == "log2" else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(attention(*args), REFERENCE.attention(*args), **tolerance)


@pytest.mark.parametrize("p", [(8, "rowmax"), (4, "log2"), (4, "cubic")])
def test_attention_ignores_what_lies_in_the_padding_of_v(p: tuple[int, str]) -> None:
    q, k, v, logit_scale, v_scale = attention_case(1, 197, 2, 64)
    poisoned = v.clone()
    poisoned[..., 197:] = -77
    tail = (logit_scale, v_scale, *p, 3.0, 0, 8, torch.uint8)
    assert torch.equal(NATIVE.attention(q, k, poisoned, *tail), NATIVE.attention(q, k, v, *tail))


@pytest.mark.parametrize("p", [(8, "rowmax"), (4, "log2"), (4, "cubic")])
def test_attention_when_one_logit_dominates_or_all_are_equal(p: tuple[int, str]) -> None:
    q, k, v, _, v_scale = attention_case(1, 50, 1, 64)
    for scale in (torch.tensor([0.0]), torch.tensor([10.0])):
        args = (q, k, v, scale, v_scale, *p, 1.0, 0, 8, torch.uint8)
        assert_codes(NATIVE.attention(*args), REFERENCE.attention(*args))


@pytest.mark.parametrize("norm", [True, False])
def test_heads_quantize(norm: bool) -> None:
    torch.manual_seed(1)
    qkv = torch.randn(2, 37, 3 * 2 * 32)
    weights = tuple(torch.randn(32) for _ in range(4))
    steps = (torch.rand(6) * 20 + 10).repeat_interleave(32)
    args = (qkv, norm, *weights, 1e-6, 2, steps, 8, 6)
    for came, wanted in zip(NATIVE.heads_quantize(*args), REFERENCE.heads_quantize(*args), strict=True):
        assert_codes(came, wanted)


def test_every_op_passes_opcheck() -> None:
    x_q, w_q, scale, column, bias = linear_case(37, 64, 96)
    linear = (x_q, w_q, scale, column, bias)
    attention = attention_case(2, 37, 2, 16)
    steps = torch.full((96,), 20.0)
    samples = {
        "quantize": (torch.randn(3, 5), 2.0, 1, 8, torch.uint8),
        "quantize_channels": (torch.randn(3, 96), steps, steps, 8, torch.uint8),
        "layernorm_quantize": (torch.randn(3, 64), None, None, 1e-6, 2.0, 1, 8, torch.uint8),
        "linear_float": (*linear, "gelu", torch.float32),
        "linear_requant": (*linear, "gelu", 2.0, 0, 8, torch.uint8),
        "linear_requant_channels": (*linear, "gelu", steps, steps, 8, torch.uint8),
        "linear_residual": (torch.randn(2, 37, 96), *linear),
        "linear_residual_layernorm": (torch.randn(2, 37, 96), *linear, None, None, 1e-6, 2.0, 1, 8, torch.uint8),
        "linear_qkv": (*linear, 2, steps, 8, 8),
        "heads_quantize": (torch.randn(2, 37, 96), False, None, None, None, None, 0.0, 2, steps, 8, 8),
        "attention": (*attention, 4, "log2", 2.0, 0, 8, torch.uint8),
    }
    assert set(samples) == set(SCHEMAS)
    for name, args in samples.items():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.lampq, name).default, args, test_utils=checks)


def test_the_cpp_library_is_built_where_there_is_a_compiler() -> None:
    if native.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    assert native.library() is not None


def test_without_a_compiler_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x_q, w_q, scale, column, bias = linear_case(197, 64, 192)
    linear = (x_q, w_q, scale, column, bias, 2, torch.full((192,), 20.0), 6, 8)
    q, k, v = NATIVE.linear_qkv(*linear)
    tail = (torch.tensor([1e-3, 2e-3]), torch.tensor([0.3, 0.1]), 8, "rowmax", 5.0, 1, 8, torch.uint8)
    out = NATIVE.attention(q, k, v, *tail)
    norm = (torch.randn(5, 64), None, None, 1e-6, 20.0, 0, 8, torch.uint8)
    normed = NATIVE.layernorm_quantize(*norm)
    monkeypatch.setattr(native, "library", lambda: None)
    for came, wanted in zip(NATIVE.linear_qkv(*linear), (q, k, v), strict=True):
        assert torch.equal(came, wanted)
    assert_codes(NATIVE.attention(q, k, v, *tail), out)
    assert_codes(NATIVE.layernorm_quantize(*norm), normed)


def test_a_broken_compiler_is_reported_and_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LAMPQ_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "could not be built" in caplog.text
    finally:
        native.library.cache_clear()


def test_without_vnni_the_codes_are_multiplied_in_floating_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert not machine.has_vnni()
    case = linear_case(50, 768, 64, seed=3)
    came = NATIVE.linear_requant(*case, "gelu", 30.0, 0, 8, torch.uint8)
    assert_codes(came, REFERENCE.linear_requant(*case, "gelu", 30.0, 0, 8, torch.uint8), 2e-2)
    q, k, v, *scales = attention_case(1, 50, 1, 64)
    for p in ((8, "rowmax"), (4, "log2"), (4, "cubic")):
        args = (q, k, v, *scales, *p, 3.0, 0, 8, torch.uint8)
        assert_codes(eager.attention(*args), REFERENCE.attention(*args))


def test_repacked_weights_follow_their_buffer() -> None:
    x_q, w_q, scale, column, bias = linear_case(9, 64, 32)
    before = NATIVE.linear_float(x_q, w_q, scale, column, bias, "none", torch.float32)
    w_q.neg_()  # in place: the repacked copy must not survive
    column.neg_()
    after = NATIVE.linear_float(x_q, w_q, scale, column, bias, "none", torch.float32)
    torch.testing.assert_close(after, 2 * bias - before, rtol=1e-4, atol=1e-4)


def test_repacked_weights_are_dropped_with_their_buffer() -> None:
    x_q, w_q, scale, column, bias = linear_case(9, 64, 32)
    held = prepack.cached_bytes()
    impl.linear_float(x_q, w_q, scale, column, bias, "none", torch.float32)
    own = prepack.cached_bytes([w_q, scale])
    assert prepack.cached_bytes() >= own >= w_q.numel() and prepack.cached_bytes([w_q.clone()]) == 0
    del w_q
    assert prepack.cached_bytes() <= held
