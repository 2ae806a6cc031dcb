"""Softmax output in powers of two and by cube roots, from the format to a served model (docs/numerics.md, rule 7)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends
from lampq_rt.adapters import describe
from lampq_rt.calibrate.recipes import PLAIN, Preparation
from lampq_rt.errors import FormatError
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import eager
from lampq_rt.kernels.ops import NATIVE
from lampq_rt.plan import Plan
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.log2 import ZERO
from lampq_rt.sites import Kind
from tests.plans import VARIANTS, assert_paths_agree, range_plan, softmax_plan, tiny_vit
from tests.test_ops import attention_case

CUBIC_BITS = range(2, 8)


def case(p: tuple[int, str], variant: str = "plain", bits: dict[str, int] | int = 8) -> tuple[nn.Module, Plan, Tensor]:
    """A tiny model, its plan with P of that (bits, scheme), and three images."""
    model = tiny_vit(**VARIANTS[variant])
    images = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    return model, softmax_plan(range_plan(model, images, bits), *p), images


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_log2_codes_are_rounded_logarithms_and_the_rest_is_zero(bits: int) -> None:
    quantizer, last = QUANTIZERS.get("log2"), 2**bits - 1
    powers = torch.exp2(-torch.arange(20.0))
    codes = quantizer.quantize(powers, None, None, bits)
    assert codes.tolist() == [c if c <= last else ZERO for c in range(20)]
    x = torch.cat([powers, powers * 1.4, powers * 1.42, torch.rand(1000), torch.tensor([0.0, 1e-45])]).clamp(max=1)
    values = quantizer.fake_quantize(x, None, None, bits)
    assert torch.equal(values, quantizer.dequantize(quantizer.quantize(x, None, None, bits), None, None))
    kept = values > 0
    assert bool((x[~kept] <= 2 ** -(last + 0.499)).all())
    assert float((values[kept] / x[kept]).log2().abs().max()) <= 0.5 + 1e-6
    unit = reference.softmax_unit(bits, "log2")
    assert torch.equal(reference.softmax_weights(x.log2(), x, bits, "log2") / unit, values)


@pytest.mark.parametrize("bits", CUBIC_BITS)
def test_cubic_codes_are_of_the_cube_root_and_weigh_its_cube(bits: int) -> None:
    quantizer, top = QUANTIZERS.get("cubic"), 2**bits - 1
    step = torch.tensor(1 / top)
    every = torch.arange(top + 1)
    assert torch.equal(quantizer.quantize((every / top) ** 3, None, None, bits), every.int())
    x = torch.cat([torch.rand(10_000), torch.exp2(-torch.arange(150.0)), torch.zeros(1)])
    codes, values = quantizer.quantize(x, None, None, bits), quantizer.fake_quantize(x, None, None, bits)
    assert torch.equal(values, quantizer.dequantize(codes, step, None))
    assert float((codes / top - x ** (1 / 3)).abs().max()) <= 0.5 / top + 1e-6
    assert float((values - (codes / top) ** 3).abs().max()) <= 0.5 / 255 + 1e-6
    weights = reference.softmax_weights(x.log2(), x, bits, "cubic") / reference.softmax_unit(bits, "cubic")
    assert float((weights != values).float().mean()) < 1e-3  # a root that an ulp brings to the other side of a tie
    assert torch.equal(quantizer.dequantize(every, step, None) * 255, reference.cube_weights(every.float(), top))


@pytest.mark.parametrize("bits", CUBIC_BITS)
def test_cubic_weights_are_exact_whether_a_compiler_contracts_or_not(bits: int) -> None:
    """On a GPU, 128 is taken off in what may be the same instruction; both must round as rational numbers do."""
    top = 2**bits - 1
    factor = Fraction(float(torch.tensor(255 / top**3)))
    weights = reference.cube_weights(torch.arange(top + 1.0), top).tolist()
    for code, weight in enumerate(weights):
        assert weight == round(Fraction(255 * code**3, top**3)) == round(code**3 * factor - 128) + 128


def test_ties_of_the_logarithm_round_half_to_even() -> None:
    shifted = -torch.arange(12) - 0.5
    weights = reference.softmax_weights(shifted, shifted.exp2(), 4, "log2")
    assert (15 - weights.log2()).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12]


def tied_logits(tokens: int) -> tuple[Tensor, ...]:
    """Every row's logits are 0, -1/2, -1, -3/2, …: half of them ties of log2 codes, and -3 one of cubic's, where the
    cube root is 1/2. And a v that only counts.
    """
    q = torch.zeros((1, 1, tokens, 8), dtype=torch.int8)
    q[..., 0], q[..., 1] = 1, 100
    k = torch.zeros_like(q)
    steps = torch.arange(tokens)
    k[0, 0, :, 0], k[0, 0, :, 1] = (-(steps % 100)).to(torch.int8), (-(steps // 100)).to(torch.int8)
    v = torch.zeros_like(q)
    v[0, 0, :8] = torch.eye(8, dtype=torch.int8)
    return q, k, reference.transpose_v(v), torch.tensor([0.5]), torch.ones(1)


def log2_weight(half_steps: int, bits: int) -> float:
    """Of a logit that many halves below the row's maximum."""
    code = round(half_steps / 2)  # Python rounds half to even as well
    return 2.0**-code if code < 2**bits else 0.0


def cubic_weight(half_steps: int, bits: int) -> float:
    """Of a logit that many halves below the row's maximum."""
    top = 2**bits - 1
    return round(round(top * 2.0 ** (-half_steps / 6)) ** 3 * 255 / top**3) / 255


@pytest.mark.parametrize("tokens", [8, 49, 197])
@pytest.mark.parametrize(
    ("weight", "p"),
    [(log2_weight, (bits, "log2")) for bits in (2, 3, 4)] + [(cubic_weight, (bits, "cubic")) for bits in range(2, 8)],
    ids=lambda x: f"{x[1]}{x[0]}" if isinstance(x, tuple) else "",
)
def test_codes_round_half_to_even_and_end_in_zero(
    tokens: int, weight: Callable[[int, int], float], p: tuple[int, str]
) -> None:
    q, k, v, *scales = tied_logits(tokens)
    for place in range(0, tokens - 7):  # the weights of eight tokens at a time
        moved = reference.transpose_v(torch.roll(v[..., :tokens].transpose(-2, -1), place, -2))
        args = (q, k, moved, *scales, *p, 1.0, 0, 16, torch.float32)
        for attention in (NATIVE.attention, eager.attention, reference.attention):
            total = torch.exp2(torch.arange(tokens) * -0.5).sum()
            wanted = torch.tensor([weight(i, p[0]) for i in range(place, place + 8)])
            torch.testing.assert_close(attention(*args)[0, 0] * total, wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("tokens", [197, 600, 1025])
@pytest.mark.parametrize("p", [(4, "log2"), (4, "cubic")])
def test_sums_are_exact_at_the_extremes(tokens: int, p: tuple[int, str]) -> None:
    q, k, v, _, v_scale = attention_case(1, tokens, 1, 16)
    v[..., :tokens] = -128
    for c in (0.0, 1e-4):  # all weights 1: with log2, 2^15 * 128 * 600 needs more than 32 bits
        args = (q, k, v, torch.tensor([c]), v_scale, *p, 1.0, 0, 16, torch.float32)
        torch.testing.assert_close(NATIVE.attention(*args), reference.attention(*args), rtol=1e-6, atol=0.0)


def test_schemes_of_softmax_codes_that_do_not_exist() -> None:
    case = attention_case(1, 5, 1, 8)
    for p, message in (
        ((5, "log2"), "log2 softmax codes of 5 bits; allowed: at most 4"),
        ((8, "cubic"), "cubic softmax codes of 8 bits; allowed: at most 7"),
        ((4, "log"), "rowmax, log2, cubic"),
    ):
        for attention in (NATIVE.attention, eager.attention, reference.attention):
            with pytest.raises(ValueError, match=message):
                attention(*case, *p, 1.0, 0, 8, torch.uint8)


def test_the_default_stays_and_log2_is_accepted_up_to_4_bits_and_cubic_up_to_7() -> None:
    site = next(s for s in describe(tiny_vit()).sites if s.kind is Kind.PV)
    assert backends.formats(Kind.PV, 4)["p"].scheme == "rowmax"
    assert {choice["p"].scheme for choice in backends.menu(site)} == {"rowmax", "float"}
    for scheme, widths in (("log2", (2, 3, 4)), ("cubic", CUBIC_BITS)):
        for bits in widths:
            chosen = backends.formats(Kind.PV, bits, p_scheme=scheme)
            assert not chosen["p"].has_steps
            backends.check_formats(site, chosen)
            backends.check_formats(site, {**chosen, "v": Format(8, "uniform", "head")})
    v = backends.formats(Kind.PV, 8)["v"]
    for p, message in (
        (Format(5, "log2", "row"), rf"{site.name}: p is .*log2 softmax output of 5 bits; allowed: 2..4"),
        (Format(8, "cubic", "row"), rf"{site.name}: p is .*cubic softmax output of 8 bits; allowed: 2..7"),
        (Format(4, "log2", "head"), rf"{site.name}: p is .*executes Format\(bits=4, scheme='log2', granularity='row'"),
        (Format(4, "uniform", "row"), "scheme='rowmax'"),
    ):
        with pytest.raises(FormatError, match=message):
            backends.check_formats(site, {"p": p, "v": v})
    with pytest.raises(FormatError, match="v is .*log2"):
        backends.check_formats(site, {"p": Format(4, "log2", "row"), "v": Format(4, "log2", "row")})
    with pytest.raises(FormatError, match="'adalog' of softmax output; allowed: rowmax, log2, cubic"):
        backends.formats(Kind.PV, 4, p_scheme="adalog")


def test_a_preparation_chooses_the_scheme_by_the_width() -> None:
    found = {s: [Preparation(softmax=s).softmax_at(bits) for bits in range(2, 9)] for s in ("rowmax", "log2", "cubic")}
    assert found == {
        "rowmax": ["rowmax"] * 7,
        "log2": ["log2"] * 3 + ["rowmax"] * 4,
        "cubic": ["log2"] * 2 + ["cubic"] * 4 + ["rowmax"],
    }
    assert PLAIN.softmax == "rowmax"
    with pytest.raises(ValueError, match="softmax 'cubes'; allowed: rowmax, log2, cubic"):
        Preparation(softmax="cubes")


@pytest.mark.parametrize("variant", ["plain", "layer_scale", "qk_norm", "registers"])
@pytest.mark.parametrize(
    ("bits", "p"),
    [(8, (4, "log2")), (8, (3, "log2")), ({"default": 6, "proj": 16}, (4, "log2")), (8, (2, "log2"))]
    + [(8, (4, "cubic")), ({"default": 6, "proj": 16}, (7, "cubic")), (8, (2, "cubic"))],
)
def test_kernels_and_simulation_agree_with_the_reference(
    variant: str, bits: dict[str, int] | int, p: tuple[int, str]
) -> None:
    model, plan, images = case(p, variant, bits)
    assert_paths_agree(model, plan, images)


@pytest.mark.parametrize("p", [(4, "log2"), (5, "cubic")])
def test_plans_and_checkpoints_keep_the_format(p: tuple[int, str], tmp_path: Path) -> None:
    model, plan, images = case(p, bits={"default": 8, "fc1": 4})
    plan.save(tmp_path / "a.plan")
    again = lampq_rt.Plan.load(tmp_path / "a.plan")
    assert again.diff(plan) == [] and again.digest == plan.digest
    fast = lampq_rt.compile(model, again)
    assert f"p={p[0]} bits ({p[1]})" in repr(fast.model.blocks[0])
    fast.save(tmp_path / "m.lampq")
    loaded = lampq_rt.load(tmp_path / "m.lampq")
    with torch.inference_mode():
        assert torch.equal(loaded(images), fast(images))
        rowmax = lampq_rt.compile(model, range_plan(model, images, {"default": 8, "fc1": 4}))(images)
        assert not torch.equal(rowmax, fast(images))


@pytest.mark.parametrize("p", [(4, "log2"), (4, "cubic")])
def test_export_traces_the_scheme(p: tuple[int, str]) -> None:
    model, plan, images = case(p)
    fast = lampq_rt.compile(model, plan)
    program = torch.export.export(fast, (images,))
    torch.testing.assert_close(program.module()(images), fast(images))
