"""GELU to ReLU: MLPs that learn it, plans and checkpoints that keep it, ops that serve it for nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import lampq_rt
from lampq_rt import Plan, backends, inspect_plan, plan_io
from lampq_rt.adapters import describe
from lampq_rt.calibrate import RECIPES, Budget, Calibration, Material, calibrate
from lampq_rt.calibrate.relu import to_relu
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.errors import PlanError
from lampq_rt.formats import FLOAT_BITS
from lampq_rt.simulate import simulate
from lampq_rt.sites import Kind
from tests.plans import assert_paths_agree, channel_plan, range_plan, tiny_vit

RELU = {"blocks.0.mlp.act": "relu", "blocks.1.mlp.act": "relu"}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit()


@pytest.fixture(scope="module")
def native() -> nn.Module:
    """The same with ReLUs of its own."""
    return tiny_vit(act_layer=nn.ReLU)


@pytest.fixture(scope="module")
def plan(model: nn.Module, native: nn.Module, images: Tensor) -> Plan:
    """Steps of the model with ReLUs, for the one with GELUs."""
    made = range_plan(native, images)
    return replace(made, weights_digest=lampq_rt.plan.weights_digest(model), activations=RELU)


@pytest.fixture(scope="module", params=["fast", "lampq+relu"])
def calibration(request: pytest.FixtureRequest, model: nn.Module, images: Tensor) -> Iterator[tuple[Calibration, Plan]]:
    """A calibration and the plan it made: of a recipe without training, and of the one that trains, cut short."""
    base = RECIPES.get(request.param)
    steps = Schedule() if request.param == "fast" else replace(base.schedule, steps=3, batch=8)
    recipe = replace(base, name="short relu", preparation=replace(base.preparation, relu=20), schedule=steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES._entries, recipe.name, recipe)
        made = calibrate(model, images)
        plan = made.plan(Budget(mean_bits=4), recipe.name)
        yield made._for(recipe.preparation), plan


def activations(model: nn.Module, plan: Plan, backend: str = "native") -> list[str | None]:
    return [block.mlp.activation for block in lampq_rt.compile(model, plan, backend=backend).model.blocks]


def test_mlps_learn_what_they_gave_with_gelu(model: nn.Module, images: Tensor) -> None:
    def error(steps: int | None) -> float:
        twin = copy.deepcopy(model).requires_grad_(False)
        if steps is None:
            for block in twin.blocks:  # type: ignore[union-attr]
                block.mlp.act = nn.ReLU()
        else:
            assert to_relu(twin, describe(twin), images, steps) is None
        assert all(type(block.mlp.act) is nn.ReLU for block in twin.blocks)  # type: ignore[union-attr]
        with torch.no_grad():
            return float((twin(images) - model(images)).square().mean())

    swapped, regressed, learned = error(None), error(0), error(60)
    assert regressed < 0.5 * swapped and learned < 0.8 * regressed
    assert error(60) == learned


def test_progress_is_told_and_a_model_without_gelus_stays(model: nn.Module, native: nn.Module, images: Tensor) -> None:
    told: list[tuple[int, int]] = []
    twin = copy.deepcopy(model).requires_grad_(False)
    to_relu(twin, describe(twin), images[:2], 1, progress=lambda done, count: told.append((done, count)))
    assert told == [(1, 2), (2, 2)]
    before = copy.deepcopy(native.state_dict())
    reason = to_relu(native, describe(native), images[:2], 1)
    assert reason is not None and "another activation than ReLU" in reason
    assert all(torch.equal(before[name], tensor) for name, tensor in native.state_dict().items())


@torch.inference_mode()
def test_a_plan_with_relus_serves_the_model_that_has_them(
    model: nn.Module, native: nn.Module, images: Tensor, plan: Plan
) -> None:
    own = replace(plan, activations={})
    assert torch.equal(lampq_rt.compile(model, plan)(images), lampq_rt.compile(native, own)(images))
    assert torch.equal(simulate(model, plan)(images), simulate(native, own)(images))
    assert not torch.equal(lampq_rt.compile(model, plan)(images), lampq_rt.compile(model, own)(images))
    assert type(model.blocks[0].mlp.act) is nn.GELU  # type: ignore[index]


@pytest.mark.parametrize("backend", ["reference", "native"])
@torch.inference_mode()
def test_codes_that_begin_at_zero_are_a_relu(model: nn.Module, images: Tensor, plan: Plan, backend: str) -> None:
    """The fused op gives the very codes that floating point, torch's ReLU and quantisation give."""
    assert activations(model, plan) == ["none", "none"]
    fused = lampq_rt.compile(model, plan, backend=backend)
    apart = lampq_rt.compile(model, plan, backend=backend)
    for block in apart.model.blocks:
        block.mlp.activation = None
    assert torch.equal(fused(images), apart(images))


def test_steps_that_waste_codes_on_negative_values_keep_an_explicit_relu(
    model: nn.Module, images: Tensor, plan: Plan
) -> None:
    name = "blocks.0.mlp.fc2"
    params = plan.sites[name]
    moved = {**params.tensors, "input.zero_point": torch.tensor(-100, dtype=torch.int32)}
    uneven = plan.with_sites({name: replace(params, tensors=moved)})
    assert activations(model, uneven) == [None, "none"]
    assert_paths_agree(model, uneven, images)
    float_fc2 = replace(params, formats=backends.formats(Kind.FC2, FLOAT_BITS), tensors={})
    assert activations(model, plan.with_sites({name: float_fc2})) == [None, "none"]


def test_steps_by_channel_clip_where_all_of_them_do(native: nn.Module, images: Tensor) -> None:
    by_channel = channel_plan(native, range_plan(native, images), images)
    fc2 = "blocks.0.mlp.fc2"
    tensors = by_channel.sites[fc2].tensors
    least = {**tensors, "input.zero_point": torch.full_like(tensors["input.zero_point"], -128.0)}
    clipping = by_channel.with_sites({fc2: replace(by_channel.sites[fc2], tensors=least)})
    assert activations(native, clipping)[0] == "none"
    least["input.zero_point"] = least["input.zero_point"].clone()
    least["input.zero_point"][3] += 0.5
    assert activations(native, clipping.with_sites({fc2: replace(clipping.sites[fc2], tensors=least)}))[0] is None


def test_a_recipe_asks_for_it(
    model: nn.Module, images: Tensor, calibration: tuple[Calibration, Plan], tmp_path: Path
) -> None:
    made, plan = calibration
    assert plan.activations == RELU and plan.provenance["refused_rewrites"] == {}
    assert plan.provenance["recipe"]["preparation"]["relu"] == 20
    assert activations(model, plan) == ["none", "none"]
    assert_paths_agree(model, plan, images, noise_below=1.0)
    with torch.no_grad():  # what plans are compared with is what the GELUs gave
        torch.testing.assert_close(made.measurements.judge.logits, model(images), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(made.ready.model(images), model(images), rtol=1e-3, atol=1e-4)
    compiled = lampq_rt.compile(model, plan)
    compiled.save(tmp_path / "x.lampq")
    again = lampq_rt.load(tmp_path / "x.lampq")
    assert again.plan.activations == RELU and again.plan.digest == plan.digest
    with torch.inference_mode():
        assert torch.equal(again(images), compiled(images))


def test_a_plan_keeps_it(tmp_path: Path, plan: Plan) -> None:
    plan.save(tmp_path / "x.plan")
    again = Plan.load(tmp_path / "x.plan")
    assert again.activations == RELU and again.diff(plan) == [] and again.digest == plan.digest
    without = replace(plan, activations={})
    assert without.digest != plan.digest
    assert "blocks.1.mlp.act: the model's own -> relu" in without.diff(plan)
    assert inspect_plan.facts(plan)["activations"] == RELU
    with (console := Console(width=200)).capture() as shown:
        console.print(inspect_plan.summary(plan))
    assert "relu in the place of the model's own in 2 MLPs" in shown.get()
    without.save(tmp_path / "y.plan")
    assert "activations" not in json.loads((tmp_path / "y.plan" / "plan.json").read_text())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.7.mlp.act", "the activation 'blocks.7.mlp.act', which VisionTransformer does not have"),
        ("blocks.0.mlp.fc1", "the activation 'blocks.0.mlp.fc1'"),
        ("blocks.0.mlp", "the activation 'blocks.0.mlp'"),
    ],
)
def test_a_name_that_the_model_lacks(model: nn.Module, plan: Plan, name: str, words: str) -> None:
    wrong = replace(plan, activations={name: "relu"})
    for attempt in (lampq_rt.compile, simulate):
        with pytest.raises(PlanError, match=words) as caught:
            attempt(model, wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", [{"blocks.0.mlp.act": "swish"}, {"../x": "relu"}, {"blocks.0.mlp.act": ["relu"]}, 3])
def test_a_file_that_asks_for_what_there_is_not(plan: Plan, found: object) -> None:
    content = {**plan_io.document(plan), "activations": found}
    with pytest.raises(PlanError, match="here: activations") as caught:
        plan_io.parse(content, plan_io.named_tensors(plan), "here")
    assert "\n" not in str(caught.value)


def test_what_a_file_cannot_hold_is_not_written(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(PlanError, match="expected relu; got 'swish'"):
        replace(plan, activations={"blocks.0.mlp.act": "swish"}).save(tmp_path / "x.plan")
    assert not (tmp_path / "x.plan").exists()


def test_images_to_train_on_may_have_another_precision(model: nn.Module, images: Tensor) -> None:
    material = calibrate(model, images[:8], material=Material(images.double())).material
    assert material.images is not None and material.images.dtype == torch.float32
