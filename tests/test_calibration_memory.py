"""What calibrating holds in memory: the model, one quantised copy of its weights, and little else."""

from __future__ import annotations

import gc

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt.calibrate import Budget, Calibration, calibrate
from lampq_rt.calibrate.spill import Lazy, Spill
from lampq_rt.memory import PeakMemory
from lampq_rt.models import weight_bytes
from lampq_rt.simulate import Simulation

MOST = 3.0
"""Peak memory over the fp32 model's bytes, the model included."""


def build(width: int, depth: int) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "num_heads": 4, "num_classes": 10}
    return VisionTransformer(embed_dim=width, depth=depth, **sizes).eval()


def measure_all(calibration: Calibration) -> None:
    """Observe, search steps at 4 bits, and take gradients at both operating points."""
    calibration.plan(Budget(mean_bits=4), "uniform")
    evidence = calibration.evidence("output-error", 4)
    assert evidence.fisher["blocks.0.attn.qkv"].trace > 0 and evidence.context["blocks.0.attn.qkv"].trace > 0


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_no_samples_are_held() -> None:
    before = tensor_bytes()
    model, images = build(192, 2), torch.randn(16, 3, 32, 32)
    calibration = calibrate(model, images)
    measure_all(calibration)
    held = tensor_bytes() - before
    assert held < 1.3 * weight_bytes(model) + 2 * images.nbytes  # samples and gradients were over ten times the model


def test_peak_memory_of_a_model_whose_weights_are_the_most_of_it() -> None:
    measure_all(calibrate(build(32, 1), torch.randn(8, 3, 32, 32)))  # libraries load what they need
    memory = PeakMemory(torch.device("cpu"))
    with memory.peak():
        model = build(384, 5)
        measure_all(calibrate(model, torch.randn(8, 3, 32, 32)))
    if memory.peak_bytes is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert memory.peak_bytes <= MOST * weight_bytes(model)


def test_a_simulation_shares_the_weights_and_leaves_them_alone() -> None:
    model = build(32, 1)
    simulation = Simulation(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in simulation.parameters()} == own
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in simulation.parameters())
    simulation.half()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_is_spilled_comes_back() -> None:
    spill, x = Spill(), torch.randn(5, 2, 3)
    spill.append("a.b/c", x[:0])
    for part in x.split(2):
        spill.append("a.b/c", part)
    assert torch.equal(spill.read("a.b/c"), x) and "a.b/c" in spill and "d" not in spill
    spill.replace("a.b/c", x[3:])
    assert torch.equal(spill.read("a.b/c"), x[3:])
    calls: list[str] = []
    lazy = Lazy(["b", "a"], lambda name: calls.append(name) or name.upper())
    assert list(lazy) == ["b", "a"] and lazy["a"] == "A" and lazy["a"] == "A" and calls == ["a", "a"]
    with pytest.raises(KeyError):
        lazy["c"]
