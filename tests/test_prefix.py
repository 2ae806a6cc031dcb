"""The prefix tokens' share of the gradients, against autograd on the whole graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.prefix import prefix_shares
from lampq_rt.simulate import Simulation
from lampq_rt.sites import BLOCK_LINEARS
from tests.test_fisher import build, linears

PREFIX = 1
IMAGES = 5


def naive(model: nn.Module, images: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """One image at a time, the whole graph, in double precision."""
    model, sums = model.double(), {name: torch.zeros(2, dtype=torch.float64) for name in names}
    outputs: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.__setitem__(name, o))
    for image, label in zip(images.double(), labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for name, gradient in zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True):
            energy = gradient[0].square().sum(-1)
            sums[name] += torch.stack((energy[:PREFIX].sum(), energy.sum()))
    return {name: float(own / whole) for name, (own, whole) in sums.items()}


@pytest.mark.parametrize("blocks", [[], ["blocks.0", "blocks.1"]], ids=["whole graph", "a block at a time"])
def test_shares_are_autograds_own(blocks: list[str]) -> None:
    """In the last block only the class token is read, and a first block feeds all."""
    model, images, labels = build(), torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES)
    names = [*linears(model), "blocks.0", "blocks.1"]
    found = prefix_shares(model, images, names, prefix=PREFIX, blocks=blocks, labels=labels)
    wanted = naive(build(), images, labels, names)
    for name in names:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    assert found["blocks.1.mlp.fc2"] == pytest.approx(1.0) and 0.0 < found["blocks.0.attn.qkv"] < 0.99


def test_the_model_is_left_as_it_was() -> None:
    model = build()
    forwards = [block.forward for block in model.blocks]
    prefix_shares(model, torch.randn(2, 3, 32, 32), linears(model), prefix=PREFIX, blocks=["blocks.0", "blocks.1"])
    assert [block.forward for block in model.blocks] == forwards
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_labels_are_drawn_by_the_seed() -> None:
    simulation = Simulation(build())
    names = [s.name for s in simulation.description.sites if s.kind in BLOCK_LINEARS]
    images = torch.randn(IMAGES, 3, 32, 32)
    first, again, other = (prefix_shares(simulation.model, images, names, prefix=1, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_without_prefix_tokens_nothing_runs() -> None:
    model = build(global_pool="avg", class_token=False)
    assert prefix_shares(model, torch.full((1, 3, 32, 32), torch.nan), ["blocks.0"], prefix=0) == {"blocks.0": 0.0}
