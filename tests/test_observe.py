"""What `observe` keeps of a forward pass: the right rows, exact ranges, whatever the batches; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import observe as module
from lampq_rt.calibrate.observe import LinearObservation, PVObservation, QKObservation, observe, patches
from lampq_rt.errors import DataError
from lampq_rt.simulate import SimulatedLinear, Simulation

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)


def simulation(**changes: Any) -> Simulation:
    torch.manual_seed(0)
    return Simulation(VisionTransformer(**{**SMALL, **changes}).eval())


def images(n: int = 20, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def inputs_of(sim: Simulation, name: str, x: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a site for all images at once."""
    seen: list[tuple[Tensor, ...]] = []
    hook = sim.module(name).register_forward_pre_hook(lambda m, args: seen.append(args))
    with torch.no_grad():
        sim(x)
    hook.remove()
    return seen[0]


def positions(rows: Tensor, every: Tensor) -> Tensor:
    """Index in `every` [T, K] of each of `rows` [R, K], with a check that it is that row."""
    index = torch.cdist(rows, every, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    torch.testing.assert_close(rows, every[index], rtol=1e-4, atol=1e-5)
    return index


@pytest.mark.parametrize("name", ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "head"])
def test_rows_are_inputs_of_the_site_and_ranges_are_exact(name: str) -> None:
    sim, x = simulation(), images()
    seen = observe(sim, x, seed=0, rows=48)[name]
    assert isinstance(seen, LinearObservation)
    (came,) = inputs_of(sim, name, x)
    linear = sim.module(name)
    assert isinstance(linear, SimulatedLinear)
    every = patches(came, linear.original) if name == "patch_embed.proj" else came.reshape(len(x), -1, came.shape[-1])
    every = every.flatten(0, 1)
    assert seen.rows.shape == (min(48, len(every)), every.shape[1]) and seen.rows.dtype == torch.float32
    index = positions(seen.rows, every)
    assert torch.equal(index.sort().values, index.unique())  # without replacement, in order
    torch.testing.assert_close((seen.low, seen.high), (float(every.min()), float(every.max())), rtol=1e-4, atol=1e-5)


def test_patches_are_what_the_convolution_multiplies() -> None:
    conv = simulation().model.patch_embed.proj.original
    x = images(2)
    with torch.no_grad():
        rows = patches(x, conv) @ conv.weight.flatten(1).t() + conv.bias
        torch.testing.assert_close(rows, conv(x).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_the_draw_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, x = simulation(), images()
    whole = observe(sim, x, seed=3, rows=40)
    monkeypatch.setattr(module, "BATCH", 7)
    parts = observe(sim, x, seed=3, rows=40)
    for name, seen in whole.items():
        for field, value in vars(seen).items():
            torch.testing.assert_close(getattr(parts[name], field), value, rtol=1e-4, atol=1e-4)


def test_the_seed_decides_the_draw() -> None:
    sim, x = simulation(), images()
    first, again, other = (observe(sim, x, seed=s, rows=40)["blocks.0.mlp.fc1"] for s in (0, 0, 1))
    assert isinstance(first, LinearObservation) and isinstance(again, LinearObservation)
    assert isinstance(other, LinearObservation)
    assert torch.equal(first.rows, again.rows) and not torch.equal(first.rows, other.rows)
    assert (first.low, first.high) == (other.low, other.high)


@pytest.mark.parametrize(("changes", "prefix"), [({}, 1), ({"reg_tokens": 4}, 5)])
def test_prefix_tokens_have_their_share(changes: dict[str, Any], prefix: int) -> None:
    sim, x = simulation(**changes), images()
    seen = observe(sim, x, seed=0, rows=64)["blocks.1.attn.proj"]
    assert isinstance(seen, LinearObservation) and seen.row_weight is not None
    (came,) = inputs_of(sim, "blocks.1.attn.proj", x)
    special = positions(seen.rows, came.flatten(0, 1)) % came.shape[1] < prefix
    assert int(special.sum()) == 16 and len(special) == 64
    assert float(seen.row_weight.mean()) == pytest.approx(1.0)
    assert float(seen.row_weight[special].sum() / seen.row_weight.sum()) == pytest.approx(module.PREFIX_SHARE)


def test_all_rows_count_the_same_where_there_is_no_prefix_token() -> None:
    seen = observe(simulation(class_token=False, global_pool="avg"), images(4), seed=0)
    linears = [s for s in seen.values() if isinstance(s, LinearObservation)]
    assert linears and all(s.row_weight is None for s in linears)


def test_matmul_operands_are_whole_images_and_exact_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    sim, x = simulation(), images()
    seen = observe(sim, x, seed=0, rows=50)
    q, k = inputs_of(sim, "blocks.1.attn.qk", x)
    _, v = inputs_of(sim, "blocks.1.attn.pv", x)
    qk, pv = seen["blocks.1.attn.qk"], seen["blocks.1.attn.pv"]
    assert isinstance(qk, QKObservation) and isinstance(pv, PVObservation)
    chosen = [i * len(x) // module.LOGIT_IMAGES for i in range(module.LOGIT_IMAGES)]
    torch.testing.assert_close((qk.q, qk.k), (q[chosen], k[chosen]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((qk.q_max, qk.k_max), (q.abs().amax((0, 2, 3)), k.abs().amax((0, 2, 3))))
    torch.testing.assert_close(pv.v_max, v.abs().amax((0, 2, 3)))
    assert pv.v.shape == (2, 50, 16)
    for head in range(2):
        positions(pv.v[head], v[:, head].flatten(0, 1))
    monkeypatch.setattr(module, "LOGIT_TOKENS", 3 * q.shape[2] + 1)
    fewer = observe(sim, x, seed=0)["blocks.1.attn.qk"]
    assert isinstance(fewer, QKObservation) and len(fewer.q) == 3
    monkeypatch.setattr(module, "LOGIT_TOKENS", 1)
    one = observe(sim, x, seed=0)["blocks.1.attn.qk"]
    assert isinstance(one, QKObservation) and len(one.q) == 1


def test_progress_counts_images() -> None:
    calls: list[tuple[int, int]] = []
    observe(simulation(), images(20), seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(8, 20), (16, 20), (20, 20)]


def test_a_nan_image_is_refused_and_leaves_no_hooks() -> None:
    sim, x = simulation(), images(4)
    x[2, 1, 5, 5] = float("nan")
    with pytest.raises(DataError, match=r"'patch_embed\.proj'.*not finite"):
        observe(sim, x, seed=0)
    assert not any(sim.module(s.name)._forward_pre_hooks for s in sim.description.sites)


@pytest.mark.parametrize(
    ("poisoned", "named"),
    [
        ("blocks.0.norm1.weight", r"'blocks\.0\.attn\.qkv'"),
        ("blocks.1.attn.qkv.weight", r"'blocks\.1\.attn\.(qk|pv)'"),
        ("head.bias", "the model's output"),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(poisoned: str, named: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL).eval()
    model.get_parameter(poisoned).data.view(-1)[-1] = float("inf")
    with pytest.raises(DataError, match=named):
        observe(Simulation(model), images(2), seed=0)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (3, 32, 32)])
def test_something_else_than_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="calibration images have shape"):
        observe(simulation(), torch.zeros(shape), seed=0)


def test_constant_images_are_legal() -> None:
    seen = observe(simulation(), torch.zeros(2, 3, 32, 32), seed=0)
    first = seen["patch_embed.proj"]
    assert isinstance(first, LinearObservation) and (first.low, first.high) == (0.0, 0.0)
