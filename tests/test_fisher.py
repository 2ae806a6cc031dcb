"""tr(F) against naive per-sample autograd, and the weighted rows against sums over all rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lampq_rt.calibrate.metrics import fisher
from lampq_rt.errors import DataError
from lampq_rt.simulate import Simulation
from lampq_rt.sites import BLOCK_LINEARS

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
VARIANTS = {
    "plain": {},
    "qk-norm and LayerScale": {"qk_norm": True, "init_values": 0.5},
    "average pooling": {"global_pool": "avg", "class_token": False},
}


def build(**kwargs: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def linears(model: nn.Module) -> list[str]:
    return [s.name for s in Simulation(model).description.sites if s.kind in BLOCK_LINEARS]


def naive(model: nn.Module, images: Tensor, labels: Tensor, names: list[str]) -> dict[str, float]:
    """Mean over samples of the squared norm of the weight's gradient, one backward pass a sample."""
    model = copy.deepcopy(model).double()
    weights = [model.get_submodule(name).weight for name in names]
    totals = dict.fromkeys(names, 0.0)
    for image, label in zip(images.double(), labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
            totals[name] += float(gradient.square().sum()) / len(images)
    return totals


@pytest.mark.parametrize("variant", VARIANTS)
def test_traces_equal_naive_per_sample_autograd(variant: str) -> None:
    model = build(**VARIANTS[variant])
    images, labels = torch.randn(11, 3, 32, 32), torch.randint(0, 10, (11,))
    names = linears(model)
    wanted = naive(model, images, labels, names)
    for found in (
        fisher.score(model, images, names, labels=labels),
        fisher.score(Simulation(model).model, images, names, labels=labels),  # frozen weights
    ):
        for name in names:
            assert found[name].trace == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize(("tokens", "k", "n"), [(3, 64, 48), (50, 7, 9), (1, 5, 5)])
def test_both_forms_of_the_squared_norm(tokens: int, k: int, n: int) -> None:
    x, d = torch.randn(4, tokens, k, dtype=torch.float64), torch.randn(4, tokens, n, dtype=torch.float64)
    wanted = torch.einsum("btk,btn->bkn", x, d).square().sum((1, 2))
    torch.testing.assert_close(fisher.squared_norms(x, d), wanted, rtol=1e-12, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    fisher.score(model, torch.randn(3, 3, 32, 32), linears(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def test_one_pass_over_the_images_and_shares_make_the_whole() -> None:
    """Every image runs forward once; what is drawn of it does not depend on the images beside it."""
    model, images = build(), torch.randn(10, 3, 32, 32)
    runs: list[int] = []
    model.register_forward_hook(lambda m, i, o: runs.append(len(o)))
    names = linears(model)[:3]
    whole = fisher.score(model, images, names, rows=20)
    assert runs == [1] * 10
    one = fisher.score(model, images[:1], names, rows=2)  # two rows an image there, too
    for name in names:
        assert torch.equal(one[name].rows, whole[name].rows[:2])
        torch.testing.assert_close(one[name].weights, whole[name].weights[:2] * 10, rtol=1e-5, atol=0)


def test_sampled_rows_estimate_the_sum_over_all_rows() -> None:
    model = build()
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    names = linears(model)
    found = fisher.score(model, images, names, labels=labels, rows=8 * 400)
    for name in names:
        torch.testing.assert_close(found[name].weights.sum(0).sum(), found[name].output.sum(), rtol=0.05, atol=0)
        gram = (found[name].weights.sum(1)[:, None] * found[name].rows.square()).sum()
        few = fisher.score(model, images, [name], labels=labels, rows=8 * 400, seed=1)[name]
        torch.testing.assert_close((few.weights.sum(1)[:, None] * few.rows.square()).sum(), gram, rtol=0.1, atol=0)


def test_drawn_labels_follow_the_seed_and_the_models_answers() -> None:
    model = build()
    images, names = torch.randn(5, 3, 32, 32), linears(model)[:2]
    first, again, other = (fisher.score(model, images, names, seed=seed) for seed in (0, 0, 1))
    for name in names:
        assert first[name].trace == again[name].trace
        assert torch.equal(first[name].rows, again[name].rows) and torch.equal(first[name].weights, again[name].weights)
        assert first[name].trace != other[name].trace
    labels = fisher.sample_labels(torch.tensor([[0.0, 100.0], [100.0, 0.0]]), 3, torch.Generator().manual_seed(0))
    assert labels.tolist() == [[1, 0]] * 3


def test_images_that_are_not_finite_are_refused() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        fisher.score(model, images, linears(model))
