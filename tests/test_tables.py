"""Inputs with levels from a table: op, plan, simulation, kernels, programs and checkpoint agree on what they mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import backends, inputs
from lampq_rt.calibrate.metrics.fisher_output import output
from lampq_rt.compiler import CompiledModel
from lampq_rt.errors import FormatError, PlanError
from lampq_rt.formats import Format
from lampq_rt.inspect_plan import _layer
from lampq_rt.kernels import reference
from lampq_rt.kernels.cpu import linear, native
from lampq_rt.latency.calls import Tracer
from lampq_rt.modules import IntegerLinear
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.quantizers import QUANTIZERS, table
from lampq_rt.simulate import simulate
from lampq_rt.sites import Kind
from lampq_rt.tuning import recorded
from lampq_rt.weights import quantized_weight
from tests.plans import VARIANTS, channel_plan, range_plan, table_plan, tiny_vit, uneven_table
from tests.round_trips import check_round_trips
from tests.tracing import exports_with_dynamic_batch, traces_in_one_graph

FC2, PROJ = "blocks.1.mlp.fc2", "blocks.1.attn.proj"
Case = tuple[nn.Module, Plan, Tensor]


def images_for(model: nn.Module, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def table_case(width: int, bits: dict[str, int] | int = 8, *, by_channel: bool = False, **changes: object) -> Case:
    """A model, its plan with tables before every integer fc2 and proj, and images."""
    model = tiny_vit(**changes)
    images = images_for(model)
    plan = range_plan(model, images, bits)
    return model, table_plan(channel_plan(model, plan, images) if by_channel else plan, width), images


def rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.fixture(scope="module", params=[False, True], ids=["tensor", "channel"])
def small(request: pytest.FixtureRequest) -> Case:
    return table_case(4, by_channel=request.param, init_values=0.5)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_quantised_input_is_the_definition(bits: int, by_channel: bool) -> None:
    torch.manual_seed(bits)
    shape = (192,) if by_channel else ()
    scale, zero_point = torch.rand(shape) * 0.1 + 0.01, torch.tensor(-37, dtype=torch.int32)
    if by_channel:
        zero_point = torch.randn(192) * 50
    levels = uneven_table(bits, -37)
    assert len(levels.unique()) > 1 << (bits - 1) and table.flaw(levels, bits) is None
    formats = backends.formats(
        Kind.FC2, bits, input_scheme="table", input_granularity="channel" if by_channel else "tensor"
    )
    tensors = {"input.scale": scale, "input.zero_point": zero_point, "input.table": levels}
    weight = torch.randn(48, 192)
    tensors["weight.scale"] = (weight * scale).abs().amax(1) / 7 if by_channel else weight.abs().amax(1) / 7
    params = SiteParams(Kind.FC2, formats, tensors, 48 * 192)
    x = torch.randn(3, 5, 192) * 6
    kept = x.clone()
    offset = zero_point if by_channel else zero_point.float()
    codes = torch.round(x * scale.reciprocal() + offset).clamp(-128, 127)
    wanted = (levels[(codes + 128).long()].float() - offset) * scale
    came = inputs.quantized_input(x, params)
    assert torch.equal(came, wanted) and torch.equal(x, kept) and came.shape == x.shape
    product = output(x.flatten(0, 1), weight, params)
    torch.testing.assert_close(product, came.flatten(0, 1) @ quantized_weight(weight, params).t())
    quantizer = QUANTIZERS.get("table")
    with pytest.raises(ValueError, match="need their table"):
        quantizer.fake_quantize(x, scale, zero_point, bits)
    again = quantizer.dequantize(quantizer.quantize(x, scale, zero_point, bits, table=levels), scale, zero_point)
    assert torch.equal(again, wanted)
    # The integer linear: levels come, exactly once looked up.
    layer = IntegerLinear(weight, None, params)
    stored = layer.quantize(x)
    assert layer.input.bits == 8 and not layer.input.packs and "from a table" in repr(layer)
    assert torch.equal(reference.load_codes(stored), levels[(codes + 128).long()].int())
    total = layer.to_float(stored)
    torch.testing.assert_close(total, came @ quantized_weight(weight, params).t(), rtol=1e-3, atol=1e-3)
    into = torch.zeros(3, 5, 48)
    layer.add_to(into, stored)
    assert torch.equal(into, total)


def test_known_formats_are_tables() -> None:
    """Powers of two of FQ-ViT and the twin ranges of PTQ4ViT, whose values are the formula's on the grid."""
    grid = torch.arange(256.0)
    powers = torch.cat([torch.zeros(1), 2.0 ** torch.arange(8)])[1:]  # 3 bits: 128 = 2^7 steps stand for 1
    nearest = powers[(grid.clamp(min=1)[:, None].log2() - powers.log2()).abs().argmin(1)]
    twin = torch.where(grid < 32, (grid / 4).floor() * 4, (grid / 32).floor() * 32).clamp(max=224)
    for levels, bits in ((nearest, 3), (twin, 4)):
        assert table.flaw((levels - 128).to(torch.int8), bits) is None


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("bits", [8, 4, {"default": 8, "fc1": 16}, {"default": 16, "fc2": 8}, {"default": 8, "pv": 4}])
@pytest.mark.parametrize("variant", ["plain", "layer_scale", "clip", "no_bias"])
def test_kernels_simulation_and_reference_agree(
    bits: dict[str, int] | int, variant: str, by_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bits == 4:  # weights of 4 bits, inputs on the 8-bit grid
        monkeypatch.setattr("tests.plans.stand_in_plan", _narrow_weights)
    model, plan, images = table_case(6, bits, by_channel=by_channel, **VARIANTS[variant])
    with torch.inference_mode():
        wanted, simulated = model(images), simulate(model, plan)(images)
        truth = lampq_rt.compile(model, plan, backend="reference")(images)
        fast = lampq_rt.compile(model, plan)
        came = [fast(images) for _ in range(3)]  # the third is a replay of the second where programs serve
    noise = rms(truth - wanted)
    assert 0 < noise < 0.7 * rms(wanted)
    assert rms(came[0] - truth) <= 0.5 * noise and rms(simulated - truth) <= 0.5 * noise
    assert torch.equal(came[0], came[1]) and torch.equal(came[0], came[2])


def _narrow_weights(model: nn.Module, images: Tensor, bits: int) -> Plan:
    from lampq_rt.standin import stand_in_plan

    return stand_in_plan(model, images, bits, input_bits=8)


def test_levels_matter(small: Case) -> None:
    model, plan, images = small
    with torch.inference_mode():
        wanted = model(images)
        uniform = {n: _without_table(p) for n, p in plan.sites.items() if "input.table" in p.tensors}
        assert len(uniform) == 4
        fine, coarse = (rms(lampq_rt.compile(model, p)(images) - wanted) for p in (plan.with_sites(uniform), plan))
    assert fine < 0.7 * coarse


def _without_table(params: SiteParams) -> SiteParams:
    """The site with the whole grid."""
    fmt = replace(params.formats["input"], bits=8, scheme="uniform")
    tensors = {key: tensor for key, tensor in params.tensors.items() if key != "input.table"}
    return replace(params, formats={**params.formats, "input": fmt}, tensors=tensors)


@contextmanager
def without_programs(model: CompiledModel) -> Iterator[CompiledModel]:
    copied = copy.deepcopy(model)
    copied.model.blocks._programs._possible = False
    yield copied


@pytest.mark.skipif(
    not (native.has_products() and linear.serves(torch.zeros(4, 4, dtype=torch.int8))),
    reason="programs need the C++ kernels for AVX512-VNNI",
)
def test_programs_replay_the_look_ups(small: Case) -> None:
    model, plan, images = small
    fast = lampq_rt.compile(model, plan)
    parts = [part for block in fast.model.blocks for part in (block.attention, block.mlp)]
    assert all(part.only_kernels for part in parts)
    with torch.inference_mode(), without_programs(fast) as plain:
        for i in (0, 1, 2, 3, 0):
            assert torch.equal(fast(images[i : i + 1]), plain(images[i : i + 1]))
    assert [len(free or ()) for free in fast.model.blocks._programs._free.values()] == [1]
    with torch.no_grad():  # a program must not go on with the old levels
        before = fast(images[:1])
        fast.model.blocks[0].mlp.fc2.table.copy_(uneven_table(2))
        moved = fast(images[:1])
        with without_programs(fast) as plain:
            assert not torch.equal(moved, before) and torch.equal(moved, plain(images[:1]))


def test_without_a_compiler_the_results_are_the_same(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan, images = small
    with torch.inference_mode():
        wanted, original = lampq_rt.compile(model, plan)(images), model(images)
        monkeypatch.setattr(native, "library", lambda: None)
        came = lampq_rt.compile(model, plan)(images)
    assert rms(came - wanted) <= 0.5 * rms(wanted - original)


def test_checkpoints_and_plans_keep_the_table(small: Case, tmp_path: Path) -> None:
    model, plan, images = small
    fast, stored = check_round_trips(model, plan, images, tmp_path)
    state = fast.state_dict()
    assert state["model.blocks.1.mlp.fc2.table"].shape == state["model.blocks.1.attention.proj.table"].shape == (256,)
    assert not any(name.startswith("state/") and name.endswith(".table") for name in stored), "it follows from the plan"
    fresh = lampq_rt.compile(model, plan)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.half()(images), fast(images))


def test_diff_and_inspect_say_it(small: Case) -> None:
    _, plan, _ = small
    params = plan.sites[FC2]
    other = plan.with_sites(
        {FC2: replace(params, tensors={**params.tensors, "input.table": params.tensors["input.table"].clamp(max=99)})}
    )
    count = int((params.tensors["input.table"] > 99).sum())
    assert plan.diff(other) == [f"{FC2}: input.table: {count} of 256 codes differ"]
    one = plan.with_sites({FC2: _without_table(params)})
    assert plan.diff(one)[:2] == [f"{FC2}: input 4 -> 8 bits", f"{FC2}: input scheme table -> uniform"]
    layer, plain = _layer(FC2, params, None), _layer(FC2, _without_table(params), None)
    assert layer.formats["input"] in ("4 from a table", "4 by channel from a table")
    assert layer.memory_bytes - plain.memory_bytes == 256


def test_export_with_dynamic_batch(small: Case) -> None:
    model, plan, images = small
    exports_with_dynamic_batch(lampq_rt.compile(model, plan), images)


@pytest.mark.slow
def test_torch_compile_in_one_graph(small: Case) -> None:
    model, plan, images = small
    traces_in_one_graph(lampq_rt.compile(model, plan), images)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_latency_tables_and_tuning_know_such_a_plan_by_the_calls_of_8_bits(small: Case, device: str) -> None:
    model, plan, images = small
    plain = plan.with_sites({n: _without_table(p) for n, p in plan.sites.items() if "input.table" in p.tensors})
    tracer = Tracer(model, images.shape[1:], device)
    one, each = (tracer.calls({name: s.formats for name, s in p.sites.items()}, 2) for p in (plain, plan))
    assert one == each
    one, each = (recorded(lampq_rt.compile(model, p).to("meta"), images.to("meta")) for p in (plain, plan))
    assert one == each and one


def test_what_such_a_format_may_not_be(small: Case, tmp_path: Path) -> None:
    model, plan, _ = small

    def message(name: str, error: type[Exception], fmt: Format | None = None, **tensors: Tensor) -> str:
        params = plan.sites[name]
        formats = {**params.formats, **({} if fmt is None else {"input": fmt})}
        changed = {**params.tensors, **{f"input.{key}": value for key, value in tensors.items()}}
        wrong = plan.with_sites({name: replace(params, formats=formats, tensors=changed)})
        with pytest.raises(error) as caught:
            lampq_rt.compile(model, wrong)
        if error is PlanError:
            with pytest.raises(PlanError, match=name):
                wrong.save(tmp_path / "a.plan")
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    four = Format(4, "table", "tensor", False)
    for name in ("head", "patch_embed.proj"):
        assert "allowed: uniform (table at linears of blocks only)" in message(name, FormatError, four)
    assert "this runtime executes" in message(PROJ, FormatError, replace(four, symmetric=True))
    assert "channel at fc2 only" in message(PROJ, FormatError, replace(four, granularity="channel"))
    levels = plan.sites[PROJ].tensors["input.table"]
    for name in (FC2, PROJ):
        for bad in (levels.short(), levels[:255], levels.view(16, 16)):
            assert "expected torch.int8 (256,)" in message(name, PlanError, table=bad)
        assert "a table must be non-decreasing" in message(name, PlanError, table=levels.flip(0))
        assert "has 256 levels; 4 bits name at most 16" in message(
            name, PlanError, table=torch.arange(-128, 128).to(torch.int8)
        )
        params = plan.sites[name]
        bare = {key: tensor for key, tensor in params.tensors.items() if key != "input.table"}
        with pytest.raises(PlanError, match="lacks the tensor input.table"):
            lampq_rt.compile(model, plan.with_sites({name: replace(params, tensors=bare)}))
    assert "input.table that its formats do not use" in message("blocks.0.mlp.fc1", PlanError, table=levels)
    for bits in (8, 16):
        with pytest.raises(FormatError, match=r"scheme 'table'"):
            Format(bits, "table", "tensor", False)
    with pytest.raises(FormatError, match=r"scheme 'log' of the input of a fc2; allowed: uniform, table"):
        backends.formats(Kind.FC2, 4, input_scheme="log")
    with pytest.raises(FormatError, match=r"scheme 'table' of the input of a head; allowed: uniform \(table at"):
        backends.formats(Kind.HEAD, 4, input_scheme="table")


def test_a_zero_point_is_one_of_the_grid(small: Case, tmp_path: Path) -> None:
    params = small[1].sites[PROJ]
    for zero_point, fits in ((-128, True), (127, True), (128, False)):
        tensors = {**params.tensors, "input.zero_point": torch.tensor(zero_point, dtype=torch.int32)}
        plan = small[1].with_sites({PROJ: replace(params, tensors=tensors)})
        if fits:
            plan.save(tmp_path / "a.plan")
            continue
        with pytest.raises(PlanError, match=r"codes of this format lie in -128..127, got 128..128"):
            plan.save(tmp_path / "a.plan")
