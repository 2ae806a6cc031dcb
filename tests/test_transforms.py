"""Rewrites leave the floating-point model's answers alone and give what they promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lampq_rt.adapters import describe
from lampq_rt.calibrate.transforms import TRANSFORMS, Context
from lampq_rt.calibrate.transforms.base import hadamard, random_orthogonal
from lampq_rt.calibrate.transforms.rotation import mean_preserving_rotation
from lampq_rt.simulate import Simulation
from tests.plans import VARIANTS, tiny_vit

ROTATABLE = {"plain", "layer_scale", "qk_norm", "registers", "average_pool", "patch_14", "dynamic"}
"""Variants whose residual stream can be rotated; the others must say why not."""


def images_for(model: Any) -> Tensor:
    return torch.randn(4, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def rewritten(model: nn.Module, images: Tensor, *names: str) -> tuple[nn.Module, dict[str, str | None]]:
    twin = copy.deepcopy(model)
    context = Context(describe(twin), images, 0)
    return twin, {name: TRANSFORMS.get(name)(twin, context) for name in names}


@torch.no_grad()
def error(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    x, y = a(images), b(images)
    return float((x - y).norm() / x.norm())


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_answers_stay(name: str, variant: str) -> None:
    model = tiny_vit(**VARIANTS[variant])
    images = images_for(model)
    twin, answers = rewritten(model, images, name)
    assert error(model, twin, images) < 1e-4
    if answers[name] is not None:  # a refused rewrite changes nothing
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    if name == "rotate-residual":
        assert (answers[name] is None) == (variant in ROTATABLE), answers[name]


def test_all_in_a_row_leave_the_answers() -> None:
    model = tiny_vit(init_values=0.5, depth=3)
    images = images_for(model)
    twin, _ = rewritten(model, images, "rotate-residual", "rotate-heads", "balance-norms")
    assert error(model, twin, images) < 1e-4


def test_constant_channels_are_harmless() -> None:
    """Trained models have LayerNorm weights that are exactly 0; RepQ-ViT's published code divides by their range."""
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].norm2.weight[3] = 0.0
        model.blocks[1].norm1.weight[5] = 0.0
    images = images_for(model)
    for name in TRANSFORMS:
        twin, _ = rewritten(model, images, name)
        assert all(bool(p.isfinite().all()) for p in twin.parameters()), name
        assert error(model, twin, images) < 1e-4, name


@pytest.mark.parametrize("size", [1, 2, 12, 24, 64, 96, 192, 384, 768, 1024, 72, 80, 66])
def test_rotations_are_orthogonal(size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    for matrix in (random_orthogonal(size, 3), mean_preserving_rotation(size, 3)):
        assert torch.allclose(matrix @ matrix.t(), eye, atol=1e-10)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(mean_preserving_rotation(size, 3) @ ones, ones, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 12, 48, 64, 192, 384, 768, 1024])
def test_hadamard_entries_are_of_one_size(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_there_is_no_hadamard_of_odd_cores() -> None:
    assert hadamard(80) is None and hadamard(66) is None


def test_a_rotation_spreads_an_outlier() -> None:
    x = torch.zeros(192, dtype=torch.float64)
    x[7] = 100.0
    assert float((mean_preserving_rotation(192, 0) @ x).abs().max()) < 25.0


def test_k_and_v_lose_their_means() -> None:
    model = tiny_vit()
    images = images_for(model)
    twin, _ = rewritten(model, images, "rotate-heads")
    simulation = Simulation(twin)
    seen: dict[str, Tensor] = {}
    for operand in ("qk", "pv"):
        module = simulation.module(f"blocks.0.attn.{operand}")
        module.register_forward_pre_hook(lambda m, inputs, o=operand: seen.update({o: inputs[1]}))
    with torch.no_grad():
        simulation(images)
    for x in seen.values():
        assert float(x.mean((0, 2)).abs().max()) < 1e-4 * float(x.abs().max())
