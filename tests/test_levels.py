"""Levels looked up by the op that makes the codes: what `reference.remap` makes of the codes, on every CPU path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import eager, linear, machine, native
from lampq_rt.kernels.ops import NATIVE, REFERENCE, SCHEMAS
from tests.test_ops import attention_case, linear_case

CONTAINERS = (torch.int8, torch.uint8)
Case = tuple[str, tuple[Any, ...]]


def random_table(seed: int = 0) -> Tensor:
    """Any bytes: the look-up does not need them sorted."""
    return torch.randint(-128, 128, (256,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def quantise_cases(dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    for shape in ((1,), (63,), (64,), (3, 65), (70_001,)):
        yield "quantize", (torch.randn(shape) * 60, 1.5, -3, 8, dtype)
    yield "quantize_channels", (torch.randn(5, 67) * 60, torch.rand(67) + 0.5, torch.randn(67) * 9, 8, dtype)
    for width in (1, 63, 64, 192, 1000):
        for affine in ((torch.randn(width), torch.randn(width)), (None, None)):
            yield "layernorm_quantize", (torch.randn(3, 67, width), *affine, 1e-6, 40.0, 5, 8, dtype)


def linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    for m, k, n in ((197, 192, 64), (1, 64, 10), (7, 588, 65), (5, 66, 130), (400, 64, 192)):
        case = linear_case(m, k, n)
        steps = (torch.rand(n) * 60 + 1, torch.randn(n) * 20)
        for activation in ("none", "gelu"):
            yield "linear_requant", (*case, activation, 30.0, -9, 8, dtype)
            yield "linear_requant", (*case, activation, 3.0, 1, 5, dtype)
            yield "linear_requant_channels", (*case, activation, *steps, 8, dtype)
        for affine in ((torch.randn(n), torch.randn(n)), (None, None)):
            yield "linear_residual_layernorm", (torch.randn(2, m, n), *case, *affine, 1e-6, 40.0, 3, 8, dtype)


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in ((2, 197, 3, 64), (1, 49, 2, 48), (1, 577, 1, 72), (2, 5, 1, 80), (3, 1, 2, 8), (1, 9, 2, 7)):
        for p in ((8, "rowmax"), (4, "log2"), (4, "cubic")):
            yield "attention", (*attention_case(*shape), *p, 3.0, -4, 8, dtype)


@pytest.fixture(params=["native", "onednn", "no compiler"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way through `kernels/cpu`; what kernels are to write is full of garbage before."""
    if request.param == "onednn":
        monkeypatch.setattr(linear, "serves", lambda w_q: False)
    elif request.param == "no compiler":
        monkeypatch.setattr(native, "library", lambda: None)
    elif not (machine.has_vnni() and native.has_products()):
        pytest.skip("the C++ kernels need AVX512-VNNI and a C++ compiler")
    empty = native.empty
    monkeypatch.setattr(
        native, "empty", lambda shape, of: empty(shape, of).fill_(float("nan") if of.is_floating_point else 85)
    )
    return str(request.param)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", CONTAINERS)
@pytest.mark.parametrize("cases", [quantise_cases, linear_cases, attention_cases])
def test_levels_are_the_codes_looked_up(cases: Any, dtype: torch.dtype) -> None:
    for seed, (name, args) in enumerate(cases(dtype)):
        table = random_table(seed)
        for ops in (NATIVE, REFERENCE):
            op, given = getattr(ops, name), [args, args]
            if name == "linear_residual_layernorm":
                given = [(args[0].clone(), *args[1:]) for _ in range(2)]
            codes = op(*given[0])
            came = op(*given[1], table)
            assert came.dtype == dtype and torch.equal(came, reference.remap(codes, table)), (name, args[0].shape)
            assert torch.equal(given[0][0], given[1][0])


@pytest.mark.parametrize("dtype", CONTAINERS)
def test_remap_is_the_table_in_place(dtype: torch.dtype) -> None:
    table, codes = random_table(), torch.randint(-128, 128, (3, 65), dtype=torch.int32)
    stored = reference.store_codes(codes, dtype)
    assert reference.remap(stored, None) is stored and torch.equal(reference.load_codes(stored), codes)
    assert reference.remap(stored, table) is stored
    assert torch.equal(reference.load_codes(stored), table[(codes + 128).long()].int())


def test_levels_of_floating_point_and_of_packed_codes_do_not_exist() -> None:
    args = (*attention_case(1, 5, 1, 8), 8, "rowmax", 1.0, 0, 16, torch.float32)
    for attention in (NATIVE.attention, eager.attention, REFERENCE.attention):
        assert torch.equal(attention(*args, random_table()), attention(*args))
    with pytest.raises(AssertionError):
        REFERENCE.quantize(torch.randn(2, 64), 1.0, 0, 4, reference.INT4, random_table())


def test_every_op_that_makes_codes_takes_a_table() -> None:
    makers = {name for name, schema in SCHEMAS.items() if "Tensor? table=None" in schema}
    tried = {name for cases in (quantise_cases, linear_cases, attention_cases) for name, _ in cases(torch.uint8)}
    assert makers == tried == set(SCHEMAS) - {"linear_float", "linear_residual", "linear_qkv", "heads_quantize"}
    for cases in (quantise_cases, linear_cases, attention_cases):
        for name, args in {name: args for name, args in cases(torch.uint8)}.items():
            op = getattr(torch.ops.lampq, name).default
            torch.library.opcheck(op, (*args, random_table()), test_utils=("test_schema", "test_faketensor"))
