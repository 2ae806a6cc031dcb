"""Edits of a plan: compiled, simulated, saved and reloaded alike, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import Plan
from lampq_rt.edits import differences, edited
from lampq_rt.errors import CheckpointError, PlanError
from lampq_rt.simulate import simulate
from tests.plans import range_plan, tiny_vit


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit(init_values=0.5)


@pytest.fixture(scope="module")
def edits(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(2)
    names = ("pos_embed", "blocks.0.norm1.weight", "blocks.1.attn.proj.bias", "blocks.1.ls2.gamma", "head.bias")
    parameters = dict(model.named_parameters())
    return {n: parameters[n].detach() + torch.randn(parameters[n].shape, generator=source) for n in names}


@pytest.fixture(scope="module")
def plan(model: nn.Module, images: Tensor, edits: dict[str, Tensor]) -> Plan:
    return replace(range_plan(model, images), edits=edits)


@torch.inference_mode()
def test_what_is_compiled_is_the_edited_model(
    model: nn.Module, images: Tensor, edits: dict[str, Tensor], plan: Plan
) -> None:
    by_hand = edited(model, edits)
    direct = replace(range_plan(model, images), weights_digest=lampq_rt.plan.weights_digest(by_hand))
    compiled = lampq_rt.compile(model, plan)
    assert torch.equal(compiled(images), lampq_rt.compile(by_hand, direct)(images))
    assert not torch.equal(compiled(images), lampq_rt.compile(model, replace(plan, edits={}))(images))
    assert torch.allclose(simulate(model, plan)(images), simulate(by_hand, direct)(images))


def test_the_model_given_is_left_alone(model: nn.Module, edits: dict[str, Tensor]) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = edited(model, edits)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(differences(model, twin, frozenset())) == set(edits)
    assert set(differences(model, twin, frozenset({"head.bias"}))) == set(edits) - {"head.bias"}


def test_a_plan_keeps_them(tmp_path: Path, plan: Plan) -> None:
    plan.save(tmp_path / "x.plan")
    again = Plan.load(tmp_path / "x.plan")
    assert again.diff(plan) == [] and again.digest == plan.digest
    assert again.edits.keys() == plan.edits.keys()
    without = replace(plan, edits={})
    assert without.digest != plan.digest
    assert any("edit of pos_embed" in line for line in without.diff(plan))


@torch.inference_mode()
def test_a_checkpoint_keeps_them_once(tmp_path: Path, model: nn.Module, images: Tensor, plan: Plan) -> None:
    compiled = lampq_rt.compile(model, plan)
    compiled.save(tmp_path / "x.lampq")
    again = lampq_rt.load(tmp_path / "x.lampq")
    assert torch.equal(again(images), compiled(images))
    assert again.plan.diff(plan) == [] and again.plan.digest == plan.digest
    plain = lampq_rt.compile(model, replace(plan, edits={}))
    plain.save(tmp_path / "y.lampq")
    extra = (tmp_path / "x.lampq").stat().st_size - (tmp_path / "y.lampq").stat().st_size
    assert extra < 1500  # the names, and what LayerScale has changed on the way into a bias


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("blocks.7.norm1.weight", torch.ones(64), "does not have"),
        ("head.bias", torch.ones(3), "shape (3,)"),
    ],
)
def test_edits_that_do_not_fit(model: nn.Module, plan: Plan, name: str, tensor: Tensor, words: str) -> None:
    with pytest.raises(PlanError, match=name) as caught:
        lampq_rt.compile(model, replace(plan, edits={name: tensor}))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor", [torch.tensor([float("nan")] * 10), torch.zeros(10, dtype=torch.int8)])
def test_edits_that_are_no_numbers(tmp_path: Path, plan: Plan, tensor: Tensor) -> None:
    with pytest.raises(PlanError, match=r"edit of 'head\.bias'"):
        replace(plan, edits={"head.bias": tensor}).save(tmp_path / "x.plan")
    assert not (tmp_path / "x.plan").exists()


def test_a_checkpoint_with_false_references(tmp_path: Path, model: nn.Module, plan: Plan) -> None:
    from lampq_rt import checkpoint

    content, tensors = checkpoint._decoded(bytes(checkpoint._encoded(lampq_rt.compile(model, plan))))
    content["edits_of_state"] = {"head.bias": "nowhere"}
    with pytest.raises(CheckpointError, match="edits_of_state"):
        checkpoint._filled(content, tensors, torch.device("cpu"))
