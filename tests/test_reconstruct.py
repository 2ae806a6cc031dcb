"""Training after compensation: gradients, the same model as is served, going on where it stopped."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt.calibrate import RECIPES, Budget, Material, calibrate
from lampq_rt.calibrate import reconstruct as training
from lampq_rt.calibrate.augment import augmented
from lampq_rt.calibrate.recipes import Recipe
from lampq_rt.calibrate.reconstruct import reconstruct
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.calibrate.straight_through import learning
from lampq_rt.edits import edited
from lampq_rt.errors import DataError
from lampq_rt.evaluate import kl_divergence
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.simulate import Simulation, simulate
from tests.plans import tiny_vit

BITS = 3
SCHEDULE = Schedule(steps=30, batch=16, codes=0.02)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit(embed_dim=32)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(model: nn.Module, images: Tensor) -> Plan:
    return calibrate(model, images[:16]).plan(Budget(mean_bits=BITS), "uniform")


def start(model: nn.Module, plan: Plan) -> Simulation:
    """A simulation that may be used up; the plan's codes are spelt out, as a compensated plan's are."""
    from lampq_rt.weights import weight_codes

    simulation = Simulation(copy.deepcopy(model)).float()
    sites = {}
    for name, params in plan.sites.items():
        if not params.is_float and "weight" in params.formats:
            weight = model.get_submodule(name).weight.detach().flatten(1)
            params = replace(params, tensors={**params.tensors, "weight.codes": weight_codes(weight, params)})
        sites[name] = params
    simulation.set(sites)
    return simulation


def test_a_model_that_can_learn_is_the_same_model(model: nn.Module, plan: Plan, images: Tensor) -> None:
    wanted = start(model, plan)(images[:4])
    simulation = start(model, plan)
    learning(simulation)
    torch.testing.assert_close(simulation(images[:4]), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_reach_everything_and_a_step_follows_them(model: nn.Module, plan: Plan, images: Tensor) -> None:
    simulation = start(model, plan)
    linears = learning(simulation)
    for linear in linears.values():
        linear.requires_grad_(True)
    simulation(images[:8]).square().sum().backward()
    for name, linear in linears.items():
        for leaf, parameter in linear.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), (name, leaf)
            assert float(parameter.grad.abs().sum()) > 0, (name, leaf)


def test_the_step_of_an_input_has_the_gradient_of_lsq(model: nn.Module, plan: Plan) -> None:
    simulation = start(model, plan)
    linear = learning(simulation)["blocks.0.attn.qkv"]
    x = torch.randn(2, 5, 32) * 3
    assert linear.log_input_step is not None
    linear.requires_grad_(True)
    linear(x).sum().backward()
    scale, zero = linear.params.tensors["input.scale"], linear.params.tensors["input.zero_point"]
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    place = x / scale + zero
    code = place.round().clamp(low, high)
    inside = (place > low - 0.5) & (place < high + 0.5)
    slope = torch.where(inside, code - place, code - zero)  # d x_hat / d step: section 2.1
    column = (
        linear.codes.round().clamp(linear.values[0], linear.values[-1]) * linear.log_weight_step.exp()[:, None]
    ).sum(0)
    wanted = (slope * scale * column).sum()
    torch.testing.assert_close(linear.log_input_step.grad, wanted.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", [SCHEDULE, replace(SCHEDULE, blocks=0.0, answers=1.0, edge=0.0)])
def test_training_brings_the_model_nearer_on_images_it_has_not_seen(
    model: nn.Module, plan: Plan, images: Tensor, schedule: Schedule
) -> None:
    seen, others = images[:32], images[32:]
    with torch.no_grad():
        exact = model(others)
        before = float(kl_divergence(exact, start(model, plan)(others)).mean())
        sites, parameters = reconstruct_now(model, plan, seen, schedule=schedule)
        after = Simulation(edited(model, parameters))
        after.set({**plan.sites, **sites})
        assert float(kl_divergence(exact, after(others)).mean()) < 0.8 * before


def reconstruct_now(
    model: nn.Module, plan: Plan, images: Tensor, resume: Path | None = None, schedule: Schedule = SCHEDULE
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    with torch.enable_grad():
        return reconstruct(model, start(model, plan), images, schedule, resume=resume)


def test_a_training_that_was_stopped_goes_on(
    model: nn.Module, plan: Plan, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parameters = reconstruct_now(model, plan, images)
    monkeypatch.setattr(training, "KEEP_EVERY", 10)
    stop_after = 14

    def stop(done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        reconstruct(model, start(model, plan), images, SCHEDULE, progress=stop, resume=state)
    steps: list[int] = []
    again, others = reconstruct(
        model, start(model, plan), images, SCHEDULE, progress=lambda done, _: steps.append(done), resume=state
    )
    assert steps[0] == 11
    for name, params in whole.items():
        for key, tensor in params.tensors.items():
            assert torch.equal(tensor, again[name].tensors[key]), (name, key)
    assert all(torch.equal(tensor, others[name]) for name, tensor in parameters.items())


def test_a_state_of_other_work_is_refused(
    model: nn.Module, plan: Plan, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 10)
    state = tmp_path / "state"
    reconstruct_now(model, plan, images, state)
    with pytest.raises(DataError, match="state of another model"):
        reconstruct_now(model, plan, images[:20], state)
    state.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a state"):
        reconstruct_now(model, plan, images, state)


def test_changed_images_stay_images() -> None:
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    y = augmented(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and not torch.equal(x, y)
    assert torch.equal(y, augmented(x, torch.Generator().manual_seed(0)))
    assert float(y.min()) >= float(x.min()) and float(y.max()) <= float(x.max())


def test_a_recipe_that_trains_compiles_and_serves_what_was_simulated(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Recipe = replace(RECIPES.get("lampq+rec"), name="short training", schedule=replace(SCHEDULE, steps=4))
    monkeypatch.setitem(RECIPES._entries, recipe.name, recipe)
    calibration = calibrate(model, images[:16], material=Material(images))
    plan = calibration.plan(Budget(mean_bits=4), recipe.name)
    served, simulated = lampq_rt.compile(model, plan), simulate(model, plan)
    with torch.no_grad():
        a, b, exact = served(images), simulated(images), model(images)
    assert float((a - b).square().mean().sqrt()) < 0.3 * float((b - exact).square().mean().sqrt())
    assert plan.provenance["recipe"]["schedule"]["steps"] == 4


def test_images_to_train_on_are_checked_like_the_others(model: nn.Module, images: Tensor) -> None:
    broken = images.clone()
    broken[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="number 3 is not finite"):
        calibrate(model, images[:16], material=Material(broken))


def test_a_training_that_diverges_says_so(model: nn.Module, plan: Plan, images: Tensor) -> None:
    with pytest.raises(DataError, match="diverged: its loss is .* at step 1"):
        reconstruct(model, start(model, plan), images * 1e30, SCHEDULE)
