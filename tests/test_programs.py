"""Recorded calls of the CPU's kernels: the same bits as the calls themselves, and nothing stale."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import lampq_rt
from lampq_rt import programs
from lampq_rt.compiler import CompiledModel
from lampq_rt.kernels.cpu import linear, native
from lampq_rt.kernels.cpu.program import Program
from lampq_rt.kernels.ops import NATIVE
from tests.plans import range_plan, tiny_vit

pytestmark = pytest.mark.skipif(
    not (native.has_products() and linear.serves(torch.zeros(4, 4, dtype=torch.int8))),
    reason="programs need the C++ kernels for AVX512-VNNI",
)


@pytest.fixture
def fast() -> CompiledModel:
    model = tiny_vit(init_values=0.5)
    return lampq_rt.compile(model, range_plan(model, images(2)))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def plain(model: CompiledModel, x: Tensor) -> Tensor:
    """The model without programs."""
    copied = copy.deepcopy(model)
    copied.model.blocks._programs._possible = False
    return copied(x)


def recorded(model: CompiledModel) -> list[int | None]:
    """Programs that are free, by shape; None where none can serve."""
    return [None if free is None else len(free) for free in model.model.blocks._programs._free.values()]


@pytest.fixture(params=[torch.inference_mode, torch.no_grad, torch.enable_grad])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


@pytest.mark.usefixtures("mode")
def test_replays_give_the_same_bits(fast: CompiledModel) -> None:
    batches = [images(n, seed) for seed, n in enumerate((1, 1, 1, 3, 1, 3, 3))]
    kept = [fast(x) for x in batches]
    assert recorded(fast) == [1, 1]
    for x, came in zip(batches, kept, strict=True):
        assert torch.equal(came, plain(fast, x)), "a later call must not overwrite what an earlier one returned"


def test_modes_may_alternate(fast: CompiledModel) -> None:
    wanted = plain(fast, images(1))
    for mode in (torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad) * 2:
        with mode():
            assert torch.equal(fast(images(1)), wanted)


def test_threads_have_programs_of_their_own(fast: CompiledModel) -> None:
    xs = [images(1, seed) for seed in range(4)]
    wanted = [plain(fast, x) for x in xs]
    threads_count = torch.get_num_threads()
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(threads_count)
        for _ in range(25):
            if not torch.equal(fast(xs[i]), wanted[i]):
                wrong.append(i)

    running = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.blocks[0].mlp.fc1.scale.mul_(2.0),
        lambda m: setattr(m.model.blocks[1].attention.qkv, "bias", m.model.blocks[1].attention.qkv.bias + 1.0),
        lambda m: m.load_state_dict({k: -v if k.endswith("w_q") else v for k, v in m.state_dict().items()}),
        lambda m: (m.model.blocks[0].mlp.norm.norm.weight.mul_(3.0), m.to("cpu")),
    ],
    ids=["in place", "replaced", "loaded", "moved"],
)
def test_changed_weights_are_seen(fast: CompiledModel, change: Callable[[CompiledModel], object]) -> None:
    before = [fast(images(1)) for _ in range(3)][-1]
    with torch.no_grad():
        change(fast)
    came = fast(images(1))
    assert torch.equal(came, plain(fast, images(1))) and not torch.equal(came, before)


def test_what_is_no_program_stays_none() -> None:
    model = tiny_vit()
    fast = lampq_rt.compile(model, range_plan(model, images(2), {"default": 8, "proj": 16}))
    wanted = plain(fast, images(1))
    assert all(torch.equal(fast(images(1)), wanted) for _ in range(3)) and not recorded(fast)
    library = native.library()
    assert library is not None

    def with_torch_inside(x: Tensor) -> Tensor:
        return NATIVE.quantize(x + 1.0, 3.0, 0, 8, torch.uint8)

    assert Program.of(library, with_torch_inside, torch.randn(2, 4, 8)) is None
    assert Program.of(library, lambda x: NATIVE.quantize(x, 3.0, 0, 8, torch.uint8), torch.randn(2, 4, 8)) is not None


def test_few_shapes_are_kept_and_large_ones_never(fast: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(1, 8):
        for _ in range(2):
            fast(images(count))
    assert len(recorded(fast)) == programs.MOST_SHAPES
    monkeypatch.setattr(programs, "MOST_BYTES", 0)
    assert not fast.model.blocks._programs.serves(torch.randn(1, 17, 64))
