"""Packed weights whose codes name levels (docs/numerics.md, "Levels of weights on chip"): every op, on every CPU path.

The truth is the weight of levels in the int8 container, which the ops know already: results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import linear, machine, native, program
from lampq_rt.kernels.ops import NATIVE, REFERENCE, SCHEMAS
from tests.test_ops import linear_case
from tests.triton_cases import weight_levels

OPS = {name for name, schema in SCHEMAS.items() if "levels=None" in schema}
SHAPES = ((197, 192, 192), (49, 64, 1000), (1, 64, 10), (3, 128, 65), (37, 320, 96))
"""(M, K, N)."""


def stored_case(shape: tuple[int, int, int], bits: int, container: torch.dtype) -> tuple[Tensor, ...]:
    """x_q, packed w_q, levels, scale, column and bias; the codes of x have zero-point -23."""
    x_q, w_q, scale, _, bias = linear_case(*shape, bits=bits)
    packed, levels = reference.pack_int4(w_q), weight_levels(bits, shape[2])
    x_q = reference.store_codes(reference.load_codes(x_q), container)
    return x_q, packed, levels, scale / 18, reference.column_constant(packed, -23, levels), bias


def calls(shape: tuple[int, int, int], bits: int, container: torch.dtype) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
    """(op, its arguments by a weight, packed weight, levels); the arguments are a function, for ops write to x."""
    x_q, packed, levels, scale, column, bias = stored_case(shape, bits, container)
    n = shape[2]
    x = torch.randn(2, shape[0], n)
    norm = (torch.randn(n), None, 1e-6, 20.0, 3, 8, container)
    steps = (torch.rand(n) * 60 + 1, torch.randn(n) * 20)
    for b in (bias, None):
        for activation in ("none", "gelu"):
            tail = (scale, column, b, activation)
            yield "linear_float", lambda w, t=tail: (x_q, w, *t, torch.float32), packed, levels
            yield "linear_requant", lambda w, t=tail: (x_q, w, *t, 30.0, -9, 8, container, None), packed, levels
            yield "linear_requant_channels", lambda w, t=tail: (x_q, w, *t, *steps, 5, container, None), packed, levels
        yield "linear_residual", lambda w, b=b: (x.clone(), x_q, w, scale, column, b), packed, levels
        yield (
            "linear_residual_layernorm",
            lambda w, b=b: (x.clone(), x_q, w, scale, column, b, *norm, None),
            packed,
            levels,
        )
        if n % 192 == 0:
            heads = (n // 192, torch.full((n,), 20.0), 8, 6)
            yield "linear_qkv", lambda w, b=b, h=heads: (x_q, w, scale, column, b, *h), packed, levels


def results(op: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """Everything that a call writes."""
    came = op(*args)
    found = [] if came is None else list(came) if isinstance(came, tuple) else [came]
    return [args[0], *found]


@pytest.fixture(params=["linear.cpp", "onednn", "no vnni"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products of codes the CPU ops use."""
    if request.param == "no vnni":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    if request.param == "linear.cpp" and not (machine.has_vnni() and native.has_products()):
        pytest.skip("linear.cpp needs AVX512-VNNI and a C++ compiler")
    if request.param != "linear.cpp":
        monkeypatch.setattr(linear, "serves", lambda w_q: False)
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("container", [torch.uint8, torch.int8], ids=["uint8", "int8"])
def test_every_op_gives_what_the_dense_weight_of_levels_gives(
    shape: tuple[int, int, int], bits: int, container: torch.dtype, path: str
) -> None:
    seen = set()
    for name, args, packed, levels in calls(shape, bits, container):
        dense = reference.dense_weight(packed, levels)
        for ops in (NATIVE, REFERENCE):
            op = getattr(ops, name)
            came, wanted = results(op, (*args(packed), levels)), results(op, args(dense))
            assert all(torch.equal(*pair) for pair in zip(came, wanted, strict=True)), name
        seen.add(name)
    assert seen == OPS - (set() if shape[2] % 192 == 0 else {"linear_qkv"})
    ones = torch.ones(shape[2])
    x_q, packed, levels, _, column, _ = stored_case(shape, bits, container)
    sums = (x_q, packed, ones, column, None, "none", torch.float32, levels)
    assert torch.equal(NATIVE.linear_float(*sums), REFERENCE.linear_float(*sums)), "sums of codes are exact"


def test_a_level_is_found_by_its_signed_code() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4)[None]
    levels = weight_levels(4, 1)
    dense = reference.dense_weight(reference.pack_int4(codes), levels)
    assert dense.dtype == torch.int8 and torch.equal(dense, levels.repeat(4)[None])
    assert int(reference.column_constant(reference.pack_int4(codes), 3, levels)) == -3 * 4 * int(levels.sum())
    identity = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(reference.dense_weight(reference.pack_int4(codes), identity), codes)
    with pytest.raises(AssertionError, match="holds the levels themselves"):
        reference.dense_weight(codes, levels)


def test_repacked_weights_follow_their_levels(path: str) -> None:
    x_q, packed, levels, scale, column, bias = stored_case((9, 64, 32), 4, torch.uint8)

    def both(*given: Tensor | None) -> Tensor:
        args = (x_q, packed, scale, column, bias, "none", torch.float32, *given)
        came = NATIVE.linear_float(*args)
        torch.testing.assert_close(came, REFERENCE.linear_float(*args), rtol=1e-5, atol=1e-5)
        return came

    first = both(levels)
    levels.neg_()  # in place
    second = both(levels)
    third = both(levels.flip(0).contiguous())  # replaced
    fourth, fifth = both(), both(None)
    seen = [first, second, third, fourth]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]) and torch.equal(fourth, fifth)
    with torch.inference_mode():
        assert torch.equal(both(levels), second)


@pytest.mark.skipif(
    not (native.has_products() and linear.serves(torch.zeros(4, 4, dtype=torch.int8))),
    reason="programs need the C++ kernels for AVX512-VNNI",
)
def test_a_recorded_call_needs_neither_codes_nor_levels_any_more() -> None:
    _, packed, levels, scale, column, bias = stored_case((1, 64, 64), 3, torch.uint8)

    def function(x: Tensor) -> Tensor:
        x_q = NATIVE.quantize(x, 20.0, 0, 8, torch.uint8)
        NATIVE.linear_residual(x, x_q, packed, scale, column, bias, levels)
        return x

    library = native.library()
    assert library is not None
    x = torch.randn(1, 5, 64)
    recorded, wanted = program.Program.of(library, function, x), function(x.clone())
    assert recorded is not None and torch.equal(recorded(x), wanted)
    levels.zero_()  # a recording reads the repacked weight; who records watches the buffers
    assert torch.equal(recorded(x), wanted) and not torch.equal(function(x.clone()), wanted)


def test_fakes_and_schemas() -> None:
    for name, args, packed, levels in calls((5, 64, 192), 4, torch.uint8):
        checks = ("test_schema", "test_faketensor")
        op = getattr(torch.ops.lampq, name).default
        torch.library.opcheck(op, (*args(packed), levels), test_utils=checks)
        torch.library.opcheck(op, args(packed), {"levels": levels}, test_utils=checks)


def test_torch_compile_traces_the_levels() -> None:
    x_q, packed, levels, scale, column, bias = stored_case((9, 64, 32), 4, torch.uint8)

    def function(x_q: Tensor, levels: Tensor) -> Tensor:
        return NATIVE.linear_requant(
            x_q, packed, scale, column, bias, "gelu", 30.0, -9, 8, torch.uint8, None, levels=levels
        )

    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x_q, levels), function(x_q, levels))
