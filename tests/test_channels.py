"""Steps by channel before fc2: plan, simulation, kernels, checkpoint and latency table agree on what they mean."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends, channels
from lampq_rt.errors import FormatError, PlanError
from lampq_rt.formats import Format
from lampq_rt.inspect_plan import _layer
from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import linear, machine, native
from lampq_rt.kernels.gpu.work import LinearWork
from lampq_rt.kernels.ops import NATIVE, REFERENCE
from lampq_rt.latency.calls import Tracer
from lampq_rt.modules import IntegerLinear
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.simulate import simulate
from lampq_rt.sites import Kind
from lampq_rt.tuning import recorded
from lampq_rt.weights import quantized_weight, weight_codes
from tests.plans import VARIANTS, channel_plan, range_plan, tiny_vit
from tests.round_trips import check_round_trips
from tests.tracing import exports_with_dynamic_batch, traces_in_one_graph

FC2 = "blocks.1.mlp.fc2"
Case = tuple[nn.Module, Plan, Tensor]


def images_for(model: nn.Module, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def channel_case(bits: dict[str, int] | int = 8, **changes: object) -> Case:
    """A model, its plan with steps by channel before every integer fc2, and images."""
    model = tiny_vit(**changes)
    images = images_for(model)
    return model, channel_plan(model, range_plan(model, images, bits), images), images


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def small() -> Case:
    return channel_case(init_values=0.5)


@pytest.mark.parametrize("bits", [8, 4, {"default": 8, "fc2": 3}, {"default": 8, "fc1": 16}, {"default": 16, "fc2": 8}])
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "clip", "no_bias"])
def test_kernels_simulation_and_reference_agree(bits: dict[str, int] | int, variant: str) -> None:
    model, plan, images = channel_case(bits, **VARIANTS[variant])
    with torch.inference_mode():
        wanted, simulated = model(images), simulate(model, plan)(images)
        truth = lampq_rt.compile(model, plan, backend="reference")(images)
        fast = lampq_rt.compile(model, plan)
        came = [fast(images) for _ in range(3)]  # the third is a replay of the second where programs serve
    noise = rms(truth - wanted)
    assert 0 < noise < 0.7 * rms(wanted)
    assert rms(came[0] - truth) <= 0.5 * noise and rms(simulated - truth) <= 0.5 * noise
    assert torch.equal(came[0], came[1]) and torch.equal(came[0], came[2])


def test_an_outlier_ruins_one_step_for_all_but_not_steps_by_channel() -> None:
    model = tiny_vit()
    images = images_for(model)
    with torch.no_grad():  # one hidden channel is always about 200, and does next to nothing
        model.blocks[1].mlp.fc1.bias[7] = 200.0
        model.blocks[1].mlp.fc2.weight[:, 7] *= 1e-3
    plan = range_plan(model, images)
    with torch.inference_mode():
        wanted = model(images)
        one, each = (
            rms(lampq_rt.compile(model, p)(images) - wanted) for p in (plan, channel_plan(model, plan, images))
        )
    assert each < 0.2 * one


def linear_case(n: int, k: int, *, gamma: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, SiteParams]:
    torch.manual_seed(seed)
    weight, bias = torch.randn(n, k), torch.randn(n)
    scale, zero_point = torch.rand(k) * 0.1 + 0.01, torch.randn(k) * 50
    steps = (weight * scale).abs().amax(1) / 127
    tensors = {"input.scale": scale, "input.zero_point": zero_point, "weight.scale": steps}
    formats = backends.formats(Kind.FC2, 8, input_granularity="channel")
    return weight, bias, torch.randn(n) if gamma else None, SiteParams(Kind.FC2, formats, tensors, n * k)


@pytest.mark.parametrize("gamma", [False, True])
def test_the_integer_linear_is_the_formula_in_fp64(gamma: bool) -> None:
    weight, bias, scale, params = linear_case(48, 192, gamma=gamma)
    step, zero_point = params.tensors["input.scale"], params.tensors["input.zero_point"]
    x = (torch.rand(3, 5, 192) * 250 - 125 - zero_point) * step  # inside the range
    layer = IntegerLinear(weight, bias, params, scale)
    codes = layer.quantize(x)
    assert torch.equal(codes, REFERENCE.quantize_channels(x, step.reciprocal(), zero_point, 8, torch.uint8))
    x_hat = (reference.load_codes(codes).double() - zero_point.double()) * step.double()
    assert float((x_hat - x).abs().div(step).max()) < 0.51
    wanted = x_hat @ quantized_weight(weight, params).double().t() + bias
    wanted = wanted if scale is None else wanted * scale
    torch.testing.assert_close(layer.to_float(codes).double(), wanted, rtol=1e-4, atol=1e-4)
    assert not layer.column.any() and "input=8 bits by channel" in repr(layer)
    # Codes that the plan decided are those of the scaled weight, too.
    given = replace(params, tensors={**params.tensors, "weight.codes": weight_codes(weight, params)})
    assert torch.equal(quantized_weight(torch.zeros_like(weight), given), quantized_weight(weight, params))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results full of garbage before a kernel writes them."""
    empty = native.empty
    monkeypatch.setattr(native, "empty", lambda *args: empty(*args).fill_(85))
    yield


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("serves", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("n", [1, 15, 17, 63, 64, 65, 130, 1000])
def test_ties_and_saturation_in_the_epilogue(
    n: int, dtype: torch.dtype, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is a code times a power of two and offsets are halves: every other value is a tie, many are out of range."""
    if not serves:
        monkeypatch.setattr(linear, "serves", lambda w_q: False)
    elif not (machine.has_vnni() and native.has_products()):
        pytest.skip("linear.cpp needs AVX512-VNNI and a C++ compiler")
    torch.manual_seed(n)
    x_q = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 64).contiguous()
    w_q = torch.zeros(n, 64, dtype=torch.int8)
    w_q[:, 0] = 1
    scale, zeros = 2.0 ** torch.randint(-2, 3, (n,)), torch.zeros(n, dtype=torch.int32)
    inv_scale, offset = 2.0 ** torch.randint(-2, 3, (n,)), torch.randint(-60, 61, (n,)) + 0.5
    for bits in (2, 4, 8):
        tail = (scale, zeros, None, "none", inv_scale, offset, bits, dtype)
        came, wanted = (ops.linear_requant_channels(x_q, w_q, *tail) for ops in (NATIVE, REFERENCE))
        assert torch.equal(came, wanted)
        low, high = reference.code_range(bits)
        found = reference.load_codes(came)
        assert int(found.min()) == low and (int(found.max()) == high or n == 1)


@pytest.mark.parametrize("bits", [8, {"default": 8, "fc1": 4, "fc2": 3}])
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "clip", "no_bias"])
def test_checkpoints_and_plans_keep_the_vectors(variant: str, bits: dict[str, int] | int, tmp_path: Path) -> None:
    model, plan, images = channel_case(bits, **VARIANTS[variant])
    fast, stored = check_round_trips(model, plan, images, tmp_path)
    assert fast.state_dict()["model.blocks.1.mlp.fc2.input_offset"].shape == (256,)
    assert not any("input_" in name for name in stored), "they follow from the plan"


def test_diff_and_inspect_say_it(small: Case) -> None:
    model, plan, images = small
    assert f"{FC2}: input granularity tensor -> channel" in range_plan(model, images).diff(plan)
    params = plan.sites[FC2]
    moved = {**params.tensors, "input.zero_point": params.tensors["input.zero_point"] + 2}
    other = plan.with_sites({FC2: replace(params, tensors=moved)})
    assert plan.diff(other) == [f"{FC2}: input.zero_point moved by up to 2"]
    layer = _layer(FC2, params, None)
    assert layer.formats["input"] == "8 by channel"
    one = _layer(FC2, range_plan(model, images).sites[FC2], None)
    assert layer.memory_bytes - one.memory_bytes == 2 * 4 * 256


def test_what_users_do_with_a_module(small: Case) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    wanted = fast(images)
    assert torch.equal(copy.deepcopy(fast)(images), wanted)
    fresh = lampq_rt.compile(model, plan)
    fresh.load_state_dict(fast.state_dict())
    assert torch.equal(fresh.half()(images), wanted), "steps stay in fp32"
    with torch.no_grad():  # a program must not go on with the old vectors
        for _ in range(3):
            fresh(images)
        fresh.model.blocks[0].mlp.fc2.input_offset.add_(20.0)
        moved = fresh(images)
    assert not torch.equal(moved, wanted) and torch.equal(moved, copy.deepcopy(fresh)(images))


def test_export_with_dynamic_batch(small: Case) -> None:
    model, plan, images = small
    exports_with_dynamic_batch(lampq_rt.compile(model, plan), images)


@pytest.mark.slow
def test_torch_compile_in_one_graph(small: Case) -> None:
    model, plan, images = small
    traces_in_one_graph(lampq_rt.compile(model, plan), images)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("variant", ["plain", "clip"])
def test_latency_tables_and_tuning_know_such_a_plan_by_the_calls_of_one_step(device: str, variant: str) -> None:
    model, plan, images = channel_case(**VARIANTS[variant])
    plain = range_plan(model, images)
    tracer = Tracer(model, images.shape[1:], device)
    one, each = (tracer.calls({name: s.formats for name, s in p.sites.items()}, 2) for p in (plain, plan))
    assert one == each
    one, each = (recorded(lampq_rt.compile(model, p).to("meta"), images.to("meta")) for p in (plain, plan))
    assert one == each and (variant == "clip" or LinearWork("requant", 4 * 17, 256, 64, gelu=True) in each)


def test_what_such_a_format_may_not_be(small: Case) -> None:
    model, plan, _ = small

    def message(name: str, error: type[Exception], *, fmt: Format | None = None, **tensors: Tensor) -> str:
        params = plan.sites[name]
        formats = {**params.formats, **({} if fmt is None else {"input": fmt})}
        changed = {**params.tensors, **{f"input.{key}": value for key, value in tensors.items()}}
        with pytest.raises(error) as caught:
            lampq_rt.compile(model, plan.with_sites({name: replace(params, formats=formats, tensors=changed)}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    vector, by_channel = torch.ones(256), Format(8, "uniform", "channel", False)
    for name in ("blocks.0.mlp.fc1", "blocks.0.attn.proj", "blocks.0.attn.qkv", "head", "patch_embed.proj"):
        told = message(name, FormatError, fmt=by_channel)
        assert name in told and "of the input of a" in told and "allowed: tensor (channel at fc2 only)" in told
    assert "this runtime executes" in message(FC2, FormatError, fmt=replace(by_channel, symmetric=True))
    assert "granularity 'head' of the input of a fc2" in message(
        FC2, FormatError, fmt=replace(by_channel, granularity="head")
    )
    assert "input.scale is torch.float32 (); expected torch.float32 (256,)" in message(
        FC2, PlanError, scale=torch.tensor(1.0)
    )
    assert "expected torch.float32 (256,)" in message(FC2, PlanError, zero_point=vector.int())
    assert "expected torch.float32 (256,)" in message(FC2, PlanError, scale=torch.ones(64))
    for bad in (0.0, -1.0, math.nan, math.inf):
        assert "input.scale must be positive and finite" in message(FC2, PlanError, scale=vector * bad)
    for bad in (math.nan, math.inf):
        assert "input.zero_point must be finite" in message(FC2, PlanError, zero_point=vector * bad)
    with pytest.raises(FormatError, match=r"granularity 'row' of the input of a fc2; allowed: tensor, channel"):
        backends.formats(Kind.FC2, 8, input_granularity="row")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("input.scale", torch.tensor(1.0), "expected torch.float32 with 1 dimensions"),
        ("input.scale", torch.zeros(256), "steps must be positive and finite"),
        ("input.zero_point", torch.tensor(1.0), "expected torch.float32 with 1 dimensions"),
        ("input.zero_point", torch.ones(256, dtype=torch.int32), "expected torch.float32 with 1 dimensions"),
        ("input.zero_point", torch.full((256,), math.nan), "zero-points must be finite"),
    ],
)
def test_a_plan_that_is_wrong_is_not_written(small: Case, key: str, value: Tensor, told: str, tmp_path: Path) -> None:
    params = small[1].sites[FC2]
    plan = small[1].with_sites({FC2: replace(params, tensors={**params.tensors, key: value})})
    with pytest.raises(PlanError, match=rf"sites\['{FC2}'\]: tensor {key}: {told}"):
        plan.save(tmp_path / "a.plan")


def test_the_cost_in_bytes_is_what_a_compiled_model_holds(small: Case) -> None:
    from lampq_rt.adapters import describe
    from lampq_rt.calibrate.costs.size import WeightBytes

    model, plan, images = small
    description = describe(model)
    cost = WeightBytes(model, description)
    one, each = (
        sum(cost.of(site, p.sites[site.name].formats) for site in description.sites)
        for p in (range_plan(model, images), plan)
    )
    held = [lampq_rt.compile(model, p).weight_bytes for p in (range_plan(model, images), plan)]
    assert each - one == held[1] - held[0] == 2 * 2 * 4 * 256


def test_the_menu_is_unchanged(small: Case) -> None:
    from lampq_rt.adapters import describe

    site = describe(small[0]).site(FC2)
    assert all(choice["input"].granularity == "tensor" for choice in backends.menu(site))
    assert not channels.by_channel(SiteParams(Kind.PV, backends.formats(Kind.PV, 8)))
