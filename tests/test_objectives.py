"""Objectives of training: their statistics against finite differences and double precision, and that they fall."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.augment import augmented
from lampq_rt.calibrate.objectives import OBJECTIVES, First, Study, aph, fisher
from lampq_rt.calibrate.objectives.base import divergence, divergence_gradient, relative_error
from lampq_rt.calibrate.orders import ORDERS
from lampq_rt.calibrate.reconstruct import reconstruct
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.edits import edited
from lampq_rt.errors import UnknownNameError
from lampq_rt.plan import Plan
from lampq_rt.simulate import Simulation, simulate
from tests.plans import range_plan, tiny_vit

BITS = 3
NAMES = ("aph", "fisher", "mse", "suffix", "tokens")
PAIRS = [(name, order) for name in NAMES for order in OBJECTIVES.get(name).orders]


def smooth(count: int, seed: int) -> Tensor:
    """Images whose neighbouring pixels are alike, so that one which was cropped and stretched is still one of them."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, 32, mode="bicubic")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit(embed_dim=32)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return smooth(32, seed=1)


@pytest.fixture(scope="module")
def plan(model: nn.Module, images: Tensor) -> Plan:
    return range_plan(model, images, {"default": BITS, "qk": 8, "pv": 8})


def study(model: nn.Module, plan: Plan, images: Tensor) -> Study:
    return Study(model, simulate(model, plan).model, images, First())


def test_the_parts_are_the_model(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        logits, outputs = stream.outputs(model, images[:3])
        assert torch.equal(logits, model(images[:3])) and len(outputs) == 2
        head = model.head(stream.penultimate(model, outputs[-1]))
        assert torch.equal(head, logits) and torch.equal(stream.answers(model, outputs[-1]), logits)
        assert torch.equal(stream.through(model, outputs[0], 1), outputs[1])


def test_the_gradient_of_the_divergence_is_that_of_finite_differences(model: nn.Module, images: Tensor) -> None:
    exact = copy.deepcopy(model).double()
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        wanted, outputs = stream.outputs(exact, images[:2].double())
        y = outputs[0] + 0.3 * torch.randn(outputs[0].shape, generator=draws, dtype=torch.float64)
        gradient = divergence_gradient(exact, 0, y, wanted)
        for _ in range(3):
            way = torch.randn(y.shape, generator=draws, dtype=torch.float64)
            ends = [stream.answers(exact, stream.through(exact, y + e * way, 1)) for e in (1e-5, -1e-5)]
            slope = (divergence(ends[0], wanted) - divergence(ends[1], wanted)) / 2e-5
            torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-5, atol=1e-12)


def hessian_times(exact: nn.Module, y: Tensor, wanted: Tensor, way: Tensor) -> Tensor:
    """H way in double precision, by differentiating twice."""
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        leaf = y.clone().requires_grad_(True)
        found = stream.answers(exact, stream.through(exact, leaf, 1))
        (gradient,) = torch.autograd.grad(divergence(found, wanted), leaf, create_graph=True)
        return torch.autograd.grad((gradient * way).sum(), leaf)[0]


def test_importance_is_the_hessian_times_signs(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted, outputs = stream.outputs(model, images[:2])
        wanted_64, outputs_64 = stream.outputs(exact, images[:2].double())
    y = outputs[0]
    signs = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).sign()
    truth = hessian_times(exact, outputs_64[0], wanted_64, signs.double()).abs()
    # What the paper moves, every element by the same amount, LayerNorm takes away.
    constant = hessian_times(exact, outputs_64[0], wanted_64, torch.ones_like(truth))
    assert float(constant.norm()) < 1e-10 * float(truth.norm())

    def error() -> float:
        return float((aph.importance(model, 0, y, wanted, signs).double() - truth).norm() / truth.norm())

    assert error() < 0.02
    monkeypatch.setattr(aph, "STEP", 1e-6)  # about the paper's, which fp32 cannot tell from rounding
    assert error() > 0.3


def test_importance_has_a_mean_of_one_and_counts(model: nn.Module, plan: Plan, images: Tensor) -> None:
    measured = OBJECTIVES.get("aph").measure(study(model, plan, images))
    y = torch.randn(2, 17, 32)
    noise = 0.1 * torch.ones_like(y)
    torch.testing.assert_close(measured(0, y + noise, y), relative_error(y + noise, y), rtol=1e-4, atol=1e-6)
    draws = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    assert float((measured(0, y + draws, y) / relative_error(y + draws, y) - 1).abs()) > 1e-3


def test_the_low_rank_part_meets_what_was_measured() -> None:
    draws = torch.Generator().manual_seed(2)
    a = torch.randn(12, 12, generator=draws, dtype=torch.float64)
    matrix = a @ a.t()
    z = torch.randn(5, 12, generator=draws, dtype=torch.float64)
    g = z @ matrix
    u = fisher.root(z, g)
    assert u.shape == (5, 12)
    torch.testing.assert_close(z @ u.t() @ u, g)
    assert len(fisher.root(torch.cat([z, z]), torch.cat([g, g]))) == 5  # what is there twice counts once


def test_noise_grows_from_the_block_to_the_whole_prefix(model: nn.Module, plan: Plan, images: Tensor) -> None:
    assert fisher.starts(0) == [0] and fisher.starts(1) == [1, 0] and fisher.starts(11) == [9, 7, 4, 2, 0]
    here = study(model, plan, images[:4])
    with torch.no_grad():
        wanted, outputs = stream.outputs(model, here.images)
        inputs = [stream.embedded(model, here.images), *outputs]
    z, g = fisher.pairs(here.exact, here.quantised, 1, inputs, wanted)
    assert z.shape == g.shape == (2, 4, 17, 32)
    assert float(z[0].norm()) < float(z[1].norm())
    torch.testing.assert_close(outputs[1] + z[0], here.quantised.blocks[1](outputs[0]))


@pytest.mark.parametrize("name", NAMES)
def test_an_error_starts_at_the_size_of_mse_and_has_its_own_gradient(
    model: nn.Module, plan: Plan, images: Tensor, name: str
) -> None:
    measured = OBJECTIVES.get(name).measure(study(model, plan, images[:8]))
    draws = torch.Generator().manual_seed(8)
    with torch.no_grad():
        y = stream.outputs(model, images[:2])[1][0]
    y_hat = (y + 0.2 * torch.randn(y.shape, generator=draws)).requires_grad_(True)
    error = measured(0, y_hat, y)
    ratio = float(error.detach() / relative_error(y_hat.detach(), y))
    assert abs(ratio - 1) < {"aph": 0.5, "tokens": 2.0}.get(name, 1e-5)  # tokens: relative to their own spread
    (gradient,) = torch.autograd.grad(error, y_hat)
    way = (y_hat.detach() - y) * torch.rand(y.shape, generator=draws)
    with torch.no_grad():
        slope = (measured(0, y_hat + 0.01 * way, y) - measured(0, y_hat - 0.01 * way, y)) / 0.02
    torch.testing.assert_close((gradient * way).sum(), slope, rtol=2e-3, atol=0)
    with torch.no_grad():
        assert float(measured(0, y.clone(), y)) == 0


@pytest.mark.parametrize(("name", "order"), PAIRS)
def test_training_lowers_its_own_loss(model: nn.Module, plan: Plan, images: Tensor, name: str, order: str) -> None:
    schedule = Schedule(steps=40, batch=16, codes=0.03, objective=name, order=order, statistics=8)
    measured = OBJECTIVES.get(name).measure(study(model, plan, images[:8]))

    seen = augmented(images, torch.Generator().manual_seed(5))

    def loss(quantised: nn.Module) -> float:
        with torch.no_grad():
            targets, outputs = stream.outputs(model, seen)[1], stream.outputs(quantised, seen)[1]
            return sum(float(measured(block, outputs[block], y)) for block, y in enumerate(targets))

    before = loss(simulate(model, plan).model)
    quantised = Simulation(copy.deepcopy(model)).float()
    quantised.set(plan.sites)
    sites, parameters = reconstruct(model, coded(quantised), images, schedule)
    after = Simulation(edited(model, parameters))
    after.set({**plan.sites, **sites})
    assert loss(after.model) < 0.5 * before


def coded(simulation: Simulation) -> Simulation:
    """The same, the codes of its weights spelt out, as a compensated plan's are."""
    from lampq_rt.weights import weight_codes

    for site in simulation.description.sites:
        module = simulation.module(site.name)
        if module.params is not None and "weight" in module.params.formats:
            codes = weight_codes(module.original.weight.detach().flatten(1), module.params)
            module.set_params(replace(module.params, tensors={**module.params.tensors, "weight.codes": codes}))
    return simulation


@pytest.mark.parametrize("field", ["objective", "order", "rounding"])
def test_a_name_that_does_not_exist_is_answered_in_one_line(field: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown .* 'no such'; known: ") as caught:
        Schedule(**{field: "no such"})
    assert "\n" not in str(caught.value)


def test_what_makes_no_sense_together_is_answered_in_one_line() -> None:
    with pytest.raises(ValueError, match="objective 'suffix', order 'together': .*; allowed: blocks") as caught:
        Schedule(objective="suffix")
    assert "\n" not in str(caught.value)
    for drop in (-0.1, 1.0):
        with pytest.raises(ValueError, match="allowed: 0 or more"):
            Schedule(drop=drop)
    with pytest.raises(ValueError, match="allowed: 1 or more"):
        Schedule(statistics=0)
    with pytest.raises(ValueError, match="allowed: 0 or more, not both 0"):
        Schedule(blocks=0.0, answers=0.0)
    with pytest.raises(ValueError, match="order 'blocks': .*; allowed: more than 0"):
        Schedule(blocks=0.0, order="blocks")


def test_every_objective_names_orders_that_exist() -> None:
    assert set(NAMES) == set(OBJECTIVES)
    for name in OBJECTIVES:
        assert set(OBJECTIVES.get(name).orders) <= set(ORDERS)


def test_schedules_of_before_are_told_apart_as_before() -> None:
    old = ("steps", "batch", "codes", "factors", "rest", "blocks", "answers", "edge")
    assert tuple(Schedule(steps=3).facts()) == old
    assert Schedule(steps=3, drop=0.5).facts() == {**Schedule(steps=3).facts(), "drop": 0.5}
