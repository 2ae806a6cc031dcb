"""Softmax output as powers of two, from the format to a served model (docs/numerics.md, rule 7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends
from lampq_rt.adapters import describe
from lampq_rt.errors import FormatError
from lampq_rt.formats import Format
from lampq_rt.kernels import reference
from lampq_rt.plan import Plan
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.quantizers.log2 import ZERO
from lampq_rt.simulate import simulate
from lampq_rt.sites import Kind
from tests.plans import VARIANTS, log2_plan, range_plan, tiny_vit


def case(variant: str = "plain", bits: dict[str, int] | int = 8, p_bits: int = 4) -> tuple[nn.Module, Plan, Tensor]:
    model = tiny_vit(**VARIANTS[variant])
    images = torch.randn(3, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    return model, log2_plan(range_plan(model, images, bits), p_bits), images


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_rounded_logarithms_and_the_rest_is_zero(bits: int) -> None:
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


def test_ties_of_the_logarithm_round_half_to_even() -> None:
    shifted = -torch.arange(12) - 0.5
    weights = reference.softmax_weights(shifted, shifted.exp2(), 4, "log2")
    assert (15 - weights.log2()).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12]


def test_the_default_stays_and_log2_is_accepted_up_to_4_bits() -> None:
    site = next(s for s in describe(tiny_vit()).sites if s.kind is Kind.PV)
    assert backends.formats(Kind.PV, 4)["p"].scheme == "rowmax"
    assert all(choice["p"].scheme != "log2" for choice in backends.menu(site))
    for bits in (2, 3, 4):
        chosen = backends.formats(Kind.PV, bits, p_scheme="log2")
        backends.check_formats(site, chosen)
        backends.check_formats(site, {**chosen, "v": Format(8, "uniform", "head")})
    v = backends.formats(Kind.PV, 8)["v"]
    for p, message in (
        (Format(5, "log2", "row"), rf"{site.name}: p is .*log2 softmax output of 5 bits; allowed: 2..4"),
        (Format(4, "log2", "head"), rf"{site.name}: p is .*executes Format\(bits=4, scheme='log2', granularity='row'"),
        (Format(4, "uniform", "row"), "scheme='rowmax'"),
    ):
        with pytest.raises(FormatError, match=message):
            backends.check_formats(site, {"p": p, "v": v})
    with pytest.raises(FormatError, match="v is .*log2"):
        backends.check_formats(site, {"p": Format(4, "log2", "row"), "v": Format(4, "log2", "row")})
    with pytest.raises(FormatError, match="'adalog' of softmax output; allowed: rowmax, log2"):
        backends.formats(Kind.PV, 4, p_scheme="adalog")


@pytest.mark.parametrize("variant", ["plain", "layer_scale", "qk_norm", "registers"])
@pytest.mark.parametrize(("bits", "p_bits"), [(8, 4), (8, 3), ({"default": 6, "proj": 16}, 4), (8, 2)])
def test_kernels_and_simulation_agree_with_the_reference(variant: str, bits: dict[str, int] | int, p_bits: int) -> None:
    model, plan, images = case(variant, bits, p_bits)
    with torch.inference_mode():
        wanted, truth = model(images), lampq_rt.compile(model, plan, backend="reference")(images)
        came = lampq_rt.compile(model, plan)(images)
        simulated = simulate(model, plan)(images)
    noise = rms(truth - wanted)
    assert 0 < noise < 0.5 * rms(wanted)
    assert rms(came - truth) <= 0.5 * noise and rms(simulated - truth) <= 0.5 * noise


def test_plans_and_checkpoints_keep_the_format(tmp_path: Path) -> None:
    model, plan, images = case(bits={"default": 8, "fc1": 4})
    plan.save(tmp_path / "a.plan")
    again = lampq_rt.Plan.load(tmp_path / "a.plan")
    assert again.diff(plan) == [] and again.digest == plan.digest
    fast = lampq_rt.compile(model, again)
    assert "p=4 bits (log2)" in repr(fast.model.blocks[0])
    fast.save(tmp_path / "m.lampq")
    loaded = lampq_rt.load(tmp_path / "m.lampq")
    with torch.inference_mode():
        assert torch.equal(loaded(images), fast(images))
        rowmax = lampq_rt.compile(model, range_plan(model, images, {"default": 8, "fc1": 4}))(images)
        assert not torch.equal(rowmax, fast(images))


def test_export_traces_the_scheme() -> None:
    model, plan, images = case()
    fast = lampq_rt.compile(model, plan)
    program = torch.export.export(fast, (images,))
    torch.testing.assert_close(program.module()(images), fast(images))
