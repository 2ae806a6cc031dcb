"""What calibrating holds in memory: the model, the codes of its weights, one block's graph, one batch of rows."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lampq_rt.calibrate import Budget, Calibration, calibrate
from lampq_rt.calibrate.compensate import compensate
from lampq_rt.calibrate.metrics import fisher
from lampq_rt.calibrate.spill import Batches, Lazy, Shelf, Spill
from lampq_rt.errors import StorageError
from lampq_rt.memory import _PAGED, PeakMemory, drop_pages, paged, return_memory, trim
from lampq_rt.models import weight_bytes
from lampq_rt.simulate import Simulation

ROOT = Path(__file__).parents[1]

MOST = 2.2
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


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered; `peak` is the most that were alive at once.

    Args:
        model: whose weights do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.sizes = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and (place := x.untyped_storage().data_ptr()) not in self.sizes:
                self.sizes[place] = x.untyped_storage().nbytes()
                self.now += self.sizes[place]
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self._gone, place)
        return result

    def _gone(self, place: int) -> None:
        self.now -= self.sizes.pop(place, 0)


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


def peak_of_measuring() -> float:
    """Peak memory over the model's bytes where the weights are the most of it; 0 where the system does not tell."""
    return_memory()  # as the command does; it changes this process
    measure_all(calibrate(build(32, 1), torch.randn(8, 3, 32, 32)))  # libraries load what they need
    memory = PeakMemory(torch.device("cpu"))
    with memory.peak():
        model = build(384, 5)
        measure_all(calibrate(model, torch.randn(8, 3, 32, 32)))
    return (memory.peak_bytes or 0) / weight_bytes(model)


def test_peak_memory_of_a_model_whose_weights_are_the_most_of_it() -> None:
    code = "from tests.test_calibration_memory import peak_of_measuring; print(peak_of_measuring())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = float(done.stdout.splitlines()[-1])
    if not found:
        pytest.skip("this system does not tell the peak of the resident set")
    assert 1.0 < found <= MOST


def test_a_simulation_shares_the_weights_and_leaves_them_alone() -> None:
    model = build(32, 1)
    simulation = Simulation(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in simulation.parameters()} == own
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in simulation.parameters())
    simulation.half()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_quantised_simulation_holds_codes() -> None:
    model, images = build(192, 2), torch.randn(8, 3, 32, 32)
    plan = calibrate(model, images).plan(Budget(mean_bits=4), "uniform")
    simulation = Simulation(model)
    before = tensor_bytes()
    simulation.set(plan.sites)
    assert tensor_bytes() - before < 0.3 * weight_bytes(model)  # was one model: weights in fp32
    assert bool(simulation(images).isfinite().all())


def test_graphs_of_fisher_do_not_grow_with_depth() -> None:
    peaks = []
    for depth in (2, 6):
        model = build(64, depth)
        names = [f"blocks.{i}.mlp.fc2" for i in range(depth)]
        with Live(model) as live:
            fisher.score(model, torch.randn(2, 3, 32, 32), names, blocks=[f"blocks.{i}" for i in range(depth)], rows=16)
        peaks.append(live.peak)
    assert peaks[1] < 1.3 * peaks[0]  # the whole graph: nearly 3 times


def test_fisher_is_the_same_with_and_without_cuts() -> None:
    model, images = build(64, 3), torch.randn(2, 3, 32, 32)
    names = ["blocks.0.attn.qkv", "blocks.2.mlp.fc1"]
    for blocks in (["blocks.0", "blocks.1", "blocks.2"], ["blocks.0", "blocks.2"]):
        whole, cut = (fisher.score(model, images, names, blocks=found) for found in ([], blocks))
        for name in names:
            assert whole[name].trace == cut[name].trace and torch.equal(whole[name].weights, cut[name].weights)
    assert "forward" not in vars(model.blocks[0])


def test_compensation_holds_one_batch_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lampq_rt.calibrate.compensate.ROWS", 64)
    monkeypatch.setattr("lampq_rt.calibrate.compensate.TOGETHER", 8)
    model, peaks = build(64, 2), []
    sites = calibrate(model, torch.randn(8, 3, 32, 32)).plan(Budget(mean_bits=4), "uniform").sites
    for count in (8, 48):
        images = torch.randn(count, 3, 32, 32)
        with Live(model) as live:
            compensate(Simulation(model), Simulation(model), images, sites)
        peaks.append(live.peak)
    stream = 40 * 17 * 64 * 4  # what 40 more images have in the residual stream
    assert peaks[1] - peaks[0] < 8 * stream  # fc2's input is four streams in each model, and was there three times


def test_codes_of_step_tables_are_not_held() -> None:
    model, images = build(128, 2), torch.randn(8, 3, 32, 32)
    searching = list[int]()

    def report(stage: str, done: int, total: int) -> None:
        if stage.startswith("steps of"):
            searching.append(tensor_bytes())

    before, calibration = tensor_bytes(), calibrate(model, images, report=report)
    plan = calibration.plan(Budget(mean_bits=4), "lampq+")
    assert max(searching) < searching[0] + 0.3 * weight_bytes(model)  # all widths' codes until the last site: 1.7
    own = sum(x.nbytes for p in plan.sites.values() for x in p.tensors.values()) + sum(
        x.nbytes for x in plan.edits.values()
    )
    held = tensor_bytes() - before - own
    assert held < 1.4 * weight_bytes(model) + 2 * images.nbytes  # the rewritten model; codes at 7 widths were 1.7 more


def test_a_paged_model_is_the_same_model_in_less_memory() -> None:
    model = build(512, 2)
    model.tied = torch.nn.Parameter(model.pos_embed.data)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert paged(model) is model
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.tied.data_ptr() == model.pos_embed.data_ptr()
    assert all(p.data_ptr() % 64 == 0 and p.requires_grad for p in model.parameters())
    model.head.bias.data[:] = 7.0  # what is written stays
    trim()
    assert bool((model.head.bias == 7.0).all())
    assert paged(torch.nn.Identity()) is not None
    del before
    memory = PeakMemory(torch.device("cpu"))  # begins with a `trim`
    with memory.peak():
        for block in model.blocks:
            assert bool(torch.stack([p.sum() for p in block.parameters()]).isfinite().all())
            drop_pages()
    if memory.peak_bytes is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert 0.2 * weight_bytes(model) < memory.peak_bytes < 0.8 * weight_bytes(model)  # one block, where there are two


def test_the_file_of_a_paged_model_goes_with_it() -> None:
    gc.collect()  # of other tests
    model = paged(build(64, 1))
    files = len(_PAGED)
    weight = model.head.weight
    del model
    gc.collect()
    assert len(_PAGED) == files
    del weight
    gc.collect()
    assert len(_PAGED) == files - 1


def test_what_is_spilled_comes_back() -> None:
    spill, x = Spill(), torch.randn(5, 2, 3)
    spill.append("a.b/c", x[:0])
    for part in x.split(2):
        spill.append("a.b/c", part)
    assert torch.equal(spill.read("a.b/c"), x) and "a.b/c" in spill and "d" not in spill
    spill.replace("a.b/c", x[3:])
    assert torch.equal(spill.read("a.b/c"), x[3:])
    codes = torch.randint(-8, 8, (3, 4), dtype=torch.int8)
    spill.append("codes", codes)
    assert torch.equal(spill.read("codes"), codes)
    for whole in (True, False):
        batches = Batches()
        for part in (x,) if whole else x.split(2):
            batches.append(part, whole)
        assert torch.equal(torch.cat(list(batches)), x) and torch.equal(torch.cat(list(batches)), x)
        batches.clear()
        assert list(batches) == []
    calls: list[str] = []
    lazy = Lazy(["b", "a"], lambda name: calls.append(name) or name.upper())
    assert list(lazy) == ["b", "a"] and lazy["a"] == "A" and lazy["a"] == "A" and calls == ["a", "a"]
    with pytest.raises(KeyError):
        lazy["c"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spill, "_path", lambda spill, key: Path("/dev/full"))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: Path("/dev/full").open("w+b"))
    model = build(32, 1)
    before = model.head.weight
    for fill in (lambda: Spill().append("x", torch.ones(5, 3)), lambda: paged(model)):
        with pytest.raises(StorageError, match="temporary folder .*: No space left on device; .* set TMPDIR"):
            fill()
    assert model.head.weight is before and bool(before.isfinite().all())


def test_a_shelf_gives_back_what_was_put_there() -> None:
    plan = calibrate(build(32, 1), torch.randn(8, 3, 32, 32)).plan(Budget(mean_bits=4), "repq")
    shelf = Shelf()
    for name, params in plan.sites.items():
        shelf.put(name, params)
    for name, params in plan.sites.items():
        found = shelf.get(name)
        assert found.formats == params.formats and found.tensors.keys() == params.tensors.keys()
        assert all(torch.equal(found.tensors[key], value) for key, value in params.tensors.items())
    assert "no such" not in shelf
