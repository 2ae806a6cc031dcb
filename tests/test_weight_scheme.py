"""Weights whose codes name unequal levels: search, plan, simulation, kernels, programs and checkpoint agree on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends
from lampq_rt.calibrate.costs.size import WeightBytes
from lampq_rt.calibrate.rounding import gptq
from lampq_rt.calibrate.search import weight_scale
from lampq_rt.calibrate.search.weight_levels import weight_levels
from lampq_rt.errors import FormatError, PlanError
from lampq_rt.formats import LEVEL_BITS, Format
from lampq_rt.inspect_plan import _layer
from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import native
from lampq_rt.latency.calls import Tracer
from lampq_rt.modules import IntegerLinear
from lampq_rt.plan import Plan
from lampq_rt.quantizers import QUANTIZERS, levels
from lampq_rt.sites import Kind
from lampq_rt.weights import contained_codes, container, quantized_weight, values, weight_codes
from tests.plans import (
    VARIANTS,
    assert_paths_agree,
    channel_plan,
    levels_plan,
    range_plan,
    table_plan,
    tiny_vit,
    uneven_levels,
)
from tests.round_trips import check_round_trips
from tests.tracing import exports_with_dynamic_batch, traces_in_one_graph

FC1 = "blocks.1.mlp.fc1"
Case = tuple[nn.Module, Plan, Tensor]


def images_for(model: nn.Module, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[3, 4, 6])
def small(request: pytest.FixtureRequest) -> Case:
    model = tiny_vit(init_values=0.5)
    images = images_for(model)
    return model, levels_plan(range_plan(model, images), request.param), images


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_codes_name_the_nearest_level(bits: int) -> None:
    table = uneven_levels(bits)
    assert levels.flaw(table, bits) is None and (int(table[0]), int(table[-1])) == (-127, 127)
    torch.manual_seed(bits)
    weight, scale = torch.randn(24, 64), torch.rand(24) * 0.02 + 0.01
    quantizer = QUANTIZERS.get("levels")
    codes = quantizer.quantize(weight, scale[:, None], None, bits, weight=True, levels=table)
    distance = (weight[..., None] / scale[:, None, None] - table.float()).abs()
    taken = distance.gather(-1, (codes.long() + (1 << bits - 1))[..., None])[..., 0]
    torch.testing.assert_close(taken, distance.amin(-1))
    again = quantizer.dequantize(codes, scale[:, None], None, levels=table)
    assert torch.equal(again, quantizer.fake_quantize(weight, scale[:, None], None, bits, levels=table))
    halfway = (table[:-1].float() + table[1:].float()) / 2
    assert torch.equal(levels.nearest(halfway, table), torch.arange(len(table) - 1, dtype=torch.int32))
    assert torch.equal(levels.codes_of(levels.of_codes(codes, table), table), codes.to(torch.int8))
    with pytest.raises(ValueError, match="none of its levels"):
        free = next(v for v in range(-127, 128) if v not in table.tolist())
        levels.codes_of(torch.tensor([free], dtype=torch.int8), table)
    with pytest.raises(ValueError, match="needs its levels"):
        quantizer.quantize(weight, scale[:, None], None, bits)


@pytest.mark.parametrize("bits", LEVEL_BITS)
def test_the_search_beats_equal_distances(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(32, 96) * torch.rand(32, 1) * 0.3
    weight[3] = 0.0  # a dead channel
    weight[4] *= torch.randn(96) ** 2  # one of long tails
    scale, table = weight_levels(weight, bits)
    assert levels.flaw(table, bits) is None and bool((scale > 0).all() and scale.isfinite().all())
    found = QUANTIZERS.get("levels").fake_quantize(weight, scale[:, None], None, bits, levels=table)
    assert float(found[3].abs().max()) < 1e-9, "a channel of zeros stays next to nothing, whatever the levels"
    if bits == 1:  # no equal distances to compare with: no other step of -a, a is better
        for factor in (0.9, 1.1):
            other = weight.sign() * weight.abs().mean(1, keepdim=True) * factor
            assert bool(((found - weight).square().sum(1) <= (other - weight).square().sum(1) + 1e-6).all())
    else:
        step = weight_scale(weight, bits)
        equal = QUANTIZERS.get("uniform").fake_quantize(weight, step[:, None], None, bits, weight=True)
        errors = [float((w - weight).square().sum()) for w in (found, equal)]
        assert errors[0] < 0.9 * errors[1]
    constant, table = weight_levels(torch.full((4, 8), 0.25), bits)
    assert levels.flaw(table, bits) is None and bool(constant.isfinite().all())


def test_gptq_with_levels_makes_less_error_than_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 32) @ torch.randn(32, 96)  # strongly dependent channels
    weight = torch.randn(24, 96)
    scale, table = weight_levels(weight, 3)
    codes = gptq(weight, scale, x.t() @ x, 3, table)
    assert int(codes.min()) >= -4 and int(codes.max()) <= 3
    found = levels.of_codes(codes, table) * scale[:, None]
    nearest = QUANTIZERS.get("levels").fake_quantize(weight, scale[:, None], None, 3, levels=table)
    errors = [float(((w - weight) @ x.t()).square().sum()) for w in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]
    whole = torch.arange(-4, 4, dtype=torch.int8)  # levels at equal distances: the uniform way, ties apart
    assert torch.equal(gptq(weight, scale * 20, x.t() @ x, 3, whole), gptq(weight, scale * 20, x.t() @ x, 3))


@pytest.mark.parametrize("features", [64, 48])
@pytest.mark.parametrize("bits", [2, 4, 5, 7])
def test_containers_hold_codes_or_values(bits: int, features: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(10, features)
    formats = backends.formats(Kind.FC1, bits, input_bits=8, weight_scheme="levels")
    tensors = {"weight.scale": weight.abs().amax(1) / 127, "weight.levels": uneven_levels(bits)}
    params = lampq_rt.plan.SiteParams(Kind.FC1, formats, {**tensors, "input.scale": torch.tensor(0.1)}, 10 * features)
    codes = weight_codes(weight, params)
    w_q, beside = container(codes, params)
    packed = bits <= 4 and features == 64
    assert (w_q.dtype == torch.uint8, beside is not None) == (packed, packed)
    assert torch.equal(reference.dense_weight(w_q, beside), values(codes, params))
    assert torch.equal(contained_codes(w_q, params), codes)
    layer = IntegerLinear(weight, None, params)
    x_q = layer.quantize(torch.randn(5, features))
    wanted = (reference.load_codes(x_q).float() * 0.1) @ quantized_weight(weight, params).t()
    torch.testing.assert_close(layer.to_float(x_q), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "no_bias", "clip", "patch_14"])
def test_kernels_simulation_and_reference_agree(bits: int, variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    images = images_for(model)
    assert_paths_agree(model, levels_plan(range_plan(model, images), bits), images, 3.0 if bits < 4 else 0.9)


def test_with_tables_and_steps_by_channel() -> None:
    model = tiny_vit()
    images = images_for(model)
    plan = table_plan(channel_plan(model, range_plan(model, images), images), 6)
    assert_paths_agree(model, levels_plan(plan, 4), images, 0.9)


def test_checkpoints_and_plans_keep_the_levels(small: Case, tmp_path: Path) -> None:
    model, plan, images = small
    _, stored = check_round_trips(model, plan, images, tmp_path)
    assert not any(name.startswith("state/") and name.endswith((".levels", ".w_q")) for name in stored)
    assert stored["codes/blocks.1.mlp.fc1"].numel() == 256 * 64 * plan.sites[FC1].bits // 8


def test_levels_matter_and_a_changed_one_is_seen(small: Case) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    with torch.no_grad():
        before = [fast(images[:1]) for _ in range(3)][-1]  # the third is a replay where programs serve
        layer = fast.model.blocks[1].mlp.fc1
        if layer.levels is None:
            layer.w_q.copy_(-layer.w_q)
        else:
            layer.levels.copy_(layer.levels.flip(0))
        after = fast(images[:1])
    assert not torch.equal(before, after)
    other = {FC1: replace(plan.sites[FC1], tensors={**plan.sites[FC1].tensors, "weight.levels": _squeezed(plan)})}
    with torch.no_grad():
        assert not torch.equal(lampq_rt.compile(model, plan.with_sites(other))(images[:1]), before)


def _squeezed(plan: Plan) -> Tensor:
    """Levels as near to each other as they may be."""
    count = len(plan.sites[FC1].tensors["weight.levels"])
    return torch.arange(-(count // 2), count // 2, dtype=torch.int8)


def test_without_a_compiler_the_results_are_the_same(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, images = small
    with torch.inference_mode():
        wanted, original = lampq_rt.compile(model, plan)(images), model(images)
        monkeypatch.setattr(native, "library", lambda: None)
        came = lampq_rt.compile(model, plan)(images)
    assert float((came - wanted).square().mean()) <= 0.25 * float((wanted - original).square().mean())


def test_sizes_are_those_of_the_compiled_model(small: Case) -> None:
    model, plan, _ = small
    cost = WeightBytes(model, lampq_rt.adapters.describe(model))
    reckoned = cost.constant + sum(
        cost.of(site, plan.sites[site.name].formats) for site in lampq_rt.adapters.describe(model).sites
    )
    fast = lampq_rt.compile(model, plan)
    gamma = sum(p.numel() for n, p in model.named_parameters() if "ls" in n.split(".")[-2:][0]) * 4
    assert fast.weight_bytes <= reckoned <= fast.weight_bytes + gamma
    layer = _layer(FC1, plan.sites[FC1], None)
    assert layer.formats["weight"] == f"{plan.sites[FC1].bits} levels"
    packed = plan.sites[FC1].bits <= 4
    assert layer.memory_bytes == 64 * 256 // (2 if packed else 1) + (16 if packed else 0)


def test_diff_says_it(small: Case) -> None:
    _, plan, _ = small
    params = plan.sites[FC1]
    squeezed = _squeezed(plan)
    other = plan.with_sites({FC1: replace(params, tensors={**params.tensors, "weight.levels": squeezed})})
    count, moved = len(squeezed), int((squeezed != params.tensors["weight.levels"]).sum())
    assert plan.diff(other) == [f"{FC1}: weight.levels: {moved} of {count} codes differ"]


def test_export_with_dynamic_batch(small: Case) -> None:
    model, plan, images = small
    exports_with_dynamic_batch(lampq_rt.compile(model, plan), images)


@pytest.mark.slow
def test_torch_compile_in_one_graph(small: Case) -> None:
    model, plan, images = small
    traces_in_one_graph(lampq_rt.compile(model, plan), images)


def test_latency_tables_know_such_a_plan_by_the_calls_of_equal_distances(small: Case) -> None:
    model, plan, images = small
    tracer = Tracer(model, images.shape[1:], "cpu")
    uneven = {name: params.formats for name, params in plan.sites.items()}
    even = {
        name: {o: replace(fmt, scheme="uniform") if o == "weight" else fmt for o, fmt in formats.items()}
        for name, formats in uneven.items()
    }
    assert tracer.calls(even, 2) == tracer.calls(uneven, 2)


def test_what_such_a_format_may_not_be(small: Case, tmp_path: Path) -> None:
    model, plan, _ = small
    params, bits = plan.sites[FC1], plan.sites[FC1].bits
    table = params.tensors["weight.levels"]

    def message(error: type[Exception], **changes: object) -> str:
        wrong = plan.with_sites({FC1: replace(params, **changes)})
        with pytest.raises(error) as caught:
            lampq_rt.compile(model, wrong)
        with pytest.raises(PlanError, match=FC1):
            wrong.save(tmp_path / "a.plan")
        assert FC1 in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def given(levels: Tensor) -> dict[str, object]:
        return {"tensors": {**params.tensors, "weight.levels": levels}}

    for bad in (table.short(), table[:-1], table.view(2, -1)):
        assert f"expected torch.int8 ({1 << bits},)" in message(PlanError, **given(bad))
    assert "levels must rise" in message(PlanError, **given(table.flip(0)))
    assert "levels must rise" in message(PlanError, **given(torch.zeros_like(table)))
    low = table.clone()
    low[0] = -128
    assert "holds -128; allowed: -127..127" in message(PlanError, **given(low))
    bare = {key: tensor for key, tensor in params.tensors.items() if key != "weight.levels"}
    assert "lacks the tensor weight.levels" in message(PlanError, tensors=bare)
    uniform = {**params.formats, "weight": Format(bits, "uniform", "channel", True)}
    assert "weight.levels that its formats do not use" in message(PlanError, formats=uniform)
    for wrong in (8, 16):
        with pytest.raises(FormatError, match=r"scheme 'levels'"):
            Format(wrong, "levels", "channel", True)
    with pytest.raises(FormatError, match=r"scheme 'nf4' of a weight; allowed: uniform, levels"):
        backends.formats(Kind.FC1, 4, weight_scheme="nf4")
    odd = {**params.formats, "input": Format(6, "levels", "tensor", False)}
    with pytest.raises(FormatError, match="this runtime executes"):
        lampq_rt.compile(model, plan.with_sites({FC1: replace(params, formats=odd)}))
