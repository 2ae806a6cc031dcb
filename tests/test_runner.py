"""The CUDA-graph runner's logic with a capture that only pretends: buckets, pieces, micro-batches, locks, failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import lampq_rt
from lampq_rt.runner import BUCKETS, CudaCapture, GraphRunner, micro_batch_for
from tests.plans import range_plan, tiny_vit


class FakeCapture:
    """Replays by calling again and writing where the first call's result lies, as a graph does.

    Attributes:
        events: what happened, in order.
        overlaps: calls that ran while another did.
        failures: raised by the next recordings, one each.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.overlaps = 0
        self.failures: list[BaseException] = []
        self._busy = threading.Lock()

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    def warm_up(self, call: Callable[[], object]) -> None:
        self.events.append("warm up")
        self._alone(call)

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor, int]:
        self.events.append("record")
        result = self._alone(call)
        if self.failures:
            raise self.failures.pop(0)

        def replay() -> None:
            self.events.append("replay")
            result.copy_(self._alone(call))

        return replay, result, 1000

    def mark(self) -> str:
        self.events.append("mark")
        return "event"

    def wait(self, event: str) -> None:
        assert event == "event"
        self.events.append("wait")

    def _alone(self, call: Callable[[], Any]) -> Any:
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1
            self._busy.acquire()
        try:
            return call()
        finally:
            self._busy.release()


class Function:
    """Row sums and maxima; notes the batch sizes it is called with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        rows = images.flatten(1)
        return torch.stack([rows.sum(1), rows.amax(1) if rows.numel() else rows.sum(1)], 1)


def made(**options: Any) -> tuple[GraphRunner, Function, FakeCapture]:
    function, capture = Function(), FakeCapture()
    return GraphRunner(function, **{"buckets": (1, 2, 4, 8), "capture": capture, **options}), function, capture


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 64])
@pytest.mark.parametrize("batch", [0, 1, 3, 4, 5, 8, 9, 21])
def test_any_batch_gives_the_functions_result(batch: int, micro_batch: int | None) -> None:
    runner, function, _ = made(micro_batch=micro_batch)
    for seed in range(2):
        x = images(batch, seed)
        torch.testing.assert_close(runner(x), Function()(x))
    assert set(function.sizes) <= {0, 1, 2, 3, 4, 8}


def test_buckets_are_captured_once_and_padding_is_not_seen() -> None:
    runner, function, capture = made()
    assert [runner.bucket(b) for b in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    runner(torch.full((4, 3, 4, 4), 100.0))
    came = runner(images(3))  # the fourth row still holds 100
    assert came.shape == (3, 2) and float(came.max()) < 50
    assert capture.events.count("record") == 1 and set(function.sizes) == {4}
    runner(images(3).double())
    runner(torch.randn(3, 3, 8, 8))
    assert capture.events.count("record") == 3, "other dtypes and sizes have graphs of their own"


def test_a_second_call_leaves_the_first_result_alone() -> None:
    runner, _, _ = made()
    first = runner(images(4, 1))
    kept = first.clone()
    second = runner(images(4, 2))
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_large_batches_run_in_pieces() -> None:
    runner, function, capture = made()
    x = images(21)
    torch.testing.assert_close(runner(x), Function()(x))
    assert set(function.sizes) == {8} and capture.events.count("replay") == 3


def test_micro_batches_run_inside_one_graph() -> None:
    runner, function, capture = made(micro_batch=3)
    x = images(7)
    torch.testing.assert_close(runner(x), Function()(x))
    assert capture.events == ["warm up", "record", "replay", "mark"] and function.sizes == [3, 3, 2] * 3
    function.sizes.clear()
    runner(images(2))
    assert set(function.sizes) == {2}, "a bucket below the micro-batch runs whole"
    with pytest.raises(ValueError, match="micro_batch is 0"):
        GraphRunner(function, micro_batch=0)


def test_what_comes_before_a_capture_sees_every_size_once() -> None:
    seen: list[int] = []
    runner, _, capture = made(micro_batch=3, before_capture=lambda x: seen.append(len(x)) or capture.events.append("p"))
    for _ in range(2):
        runner(images(8))
    assert seen == [3, 2] and capture.events[:3] == ["p", "p", "warm up"]


def test_calls_wait_for_each_other_on_the_device() -> None:
    runner, _, capture = made()
    runner(images(1))
    runner(images(1))
    assert capture.events == ["warm up", "record", "replay", "mark", "wait", "replay", "mark"]


def test_threads_may_call_at_once() -> None:
    runner, _, capture = made(micro_batch=2)
    wanted = [Function()(images(1 + i % 9, i)) for i in range(8)]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not torch.allclose(runner(images(1 + index % 9, index)), wanted[index], rtol=1e-5, atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and capture.overlaps == 0
    assert capture.events.count("record") == 4


def test_one_runner_captures_at_a_time() -> None:
    """Entering a capture synchronises the device, and so does a tuner: either would break another's capture."""
    active, most = 0, 0

    def slowly(x: Tensor) -> Tensor:
        nonlocal active, most
        active += 1
        most = max(most, active)
        time.sleep(0.02)
        active -= 1
        return x.flatten(1).sum(1, keepdim=True)

    runners = [GraphRunner(slowly, (1, 2), before_capture=slowly, capture=FakeCapture()) for _ in range(4)]
    threads = [threading.Thread(target=runner._captured, args=(images(2), 2)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


class FakeCuda:
    """Two devices that note on which stream what is called, in place of torch.cuda's functions.

    Attributes:
        device: the current one.
        streams: the current stream of every device, as (device, number).
        captures: (stream, pool) of every capture, in order.
        ran: streams that calls ran on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.made = 0, 0
        self.streams: dict[int, Any] = {}
        self.captures: list[tuple[Any, Any]] = []
        self.ran: list[Any] = []
        self.graph_pool_handle = lambda: self._next()
        self.current_device = lambda: self.device
        self.current_stream = lambda: self.streams.setdefault(self.device, self.Stream(self.device))
        self.empty_cache, self.memory_reserved = lambda: None, lambda: 0
        for name in ("graph_pool_handle", "current_device", "current_stream", "empty_cache", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("Stream", "CUDAGraph", "stream", "set_stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def _next(self) -> int:
        self.made += 1
        return self.made

    def Stream(self, device: int | None = None) -> Any:  # noqa: N802
        made = FakeStream()
        made.device, made.number = self.device if device is None else device, self._next()
        return made

    def CUDAGraph(self) -> Any:  # noqa: N802
        return FakeStream()

    def set_stream(self, stream: Any) -> None:
        self.device, self.streams[stream.device] = stream.device, stream

    @contextmanager
    def stream(self, stream: Any) -> Any:
        outer = self.current_stream()
        self.set_stream(stream)
        yield
        self.set_stream(outer)  # not after a failure, as a capture that cannot end

    @contextmanager
    def graph(self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
        assert stream is not None, "torch would capture on a stream of the device that captured first"
        assert capture_error_mode == "thread_local"
        self.captures.append((stream, pool))
        with self.stream(stream):
            yield

    def call(self) -> Tensor:
        self.ran.append(self.current_stream())
        return torch.zeros(1)


class FakeStream:
    device: int
    number: int

    def wait_stream(self, other: Any) -> None:
        assert other is not self

    def replay(self) -> None:
        pass


def test_every_runner_has_its_streams_and_pool_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    first, second = CudaCapture(), CudaCapture()
    for capture, device in ((first, 0), (first, 1), (second, 1), (first, 0), (second, 1)):
        cuda.device = device
        outer = cuda.current_stream()
        capture.warm_up(cuda.call)
        capture.record(cuda.call)
        assert (cuda.device, cuda.current_stream()) == (device, outer)
    assert [stream.device for stream, _ in cuda.captures] == [0, 1, 1, 0, 1]
    assert cuda.captures[0] == cuda.captures[3] and cuda.captures[2] == cuda.captures[4], "graphs of a runner share"
    assert len({id(stream) for stream, _ in cuda.captures}) == len({pool for _, pool in cuda.captures}) == 3
    warm = {id(stream) for i, stream in enumerate(cuda.ran) if i % 3 < 2}
    assert len(warm) == 3 and warm.isdisjoint(id(stream) for stream, _ in cuda.captures)


def test_after_a_failed_capture_a_device_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capture = FakeCuda(monkeypatch), CudaCapture()
    outer = cuda.current_stream()

    def fails() -> Tensor:
        raise RuntimeError("illegal")

    with pytest.raises(RuntimeError, match="illegal"):
        capture.record(fails)
    assert cuda.current_stream() is outer
    capture.record(cuda.call)
    assert cuda.captures[0][0] is not cuda.captures[1][0] and cuda.captures[0][1] != cuda.captures[1][1]


def test_a_failure_inside_a_capture_leaves_the_runner_usable() -> None:
    runner, _, capture = made()
    x = images(4)
    capture.failures = [RuntimeError("illegal"), KeyboardInterrupt()]
    with pytest.raises(RuntimeError, match="illegal"):
        runner(x)
    with pytest.raises(KeyboardInterrupt):
        runner(x)
    torch.testing.assert_close(runner(x), Function()(x))
    assert capture.events.count("replay") == 1


@pytest.mark.parametrize("hidden", [False, True])
def test_without_memory_a_bucket_runs_without_a_graph(hidden: bool, caplog: pytest.LogCaptureFixture) -> None:
    runner, function, capture = made(micro_batch=2)
    lack: Exception = torch.OutOfMemoryError("CUDA out of memory")
    if hidden:  # ending the capture failed in turn
        lack = RuntimeError("capture invalidated")
        lack.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    capture.failures = [lack, torch.OutOfMemoryError("again")]
    with caplog.at_level(logging.WARNING, "lampq_rt"):
        for batch in (8, 7, 4, 8):
            x = images(batch, batch)
            torch.testing.assert_close(runner(x), Function()(x))
    assert [r.getMessage() for r in caplog.records] == [
        "no memory for a CUDA graph of 8 images: they run without one, slower"
    ]
    assert capture.events.count("record") == 2 and capture.events.count("replay") == 0
    runner(images(1))
    assert capture.events.count("replay") == 1, "other buckets keep their graphs"
    assert max(function.sizes) == 2


def test_memory_is_reported() -> None:
    runner, _, _ = made()
    assert runner.memory_bytes == 0
    runner(images(3))
    runner(images(1))
    assert runner.memory_bytes == 2 * 1000 + (4 + 1) * 3 * 4 * 4 * 4


def test_inference_mode_and_not_may_alternate() -> None:
    runner, _, _ = made(micro_batch=2)
    x = images(4)
    with torch.inference_mode():
        first = runner(images(4))
    came = runner(x.requires_grad_())
    assert torch.equal(first, came) and not came.requires_grad and not came.is_inference()


def test_the_rule_for_micro_batches() -> None:
    h100, a100 = 50 << 20, 40 << 20
    tiny, small, base = (197 * 5 * d for d in (192, 384, 768))
    assert micro_batch_for(tiny, h100) == 128 and micro_batch_for(small, h100) == 64
    assert micro_batch_for(base, h100) is None and micro_batch_for(tiny, a100) == 128
    assert micro_batch_for(small, 0) is None
    assert all(m in BUCKETS for m in (64, 128))


def test_threads_that_call_first_share_one_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(depth=1)
    fast = lampq_rt.compile(model, range_plan(model, torch.randn(1, 3, 32, 32)))
    made: list[GraphRunner] = []

    def new_runner(device: torch.device) -> GraphRunner:
        time.sleep(0.05)
        made.append(GraphRunner(fast.model, capture=FakeCapture()))
        return made[-1]

    monkeypatch.setattr(fast, "_new_runner", new_runner)
    got: list[GraphRunner] = []
    threads = [threading.Thread(target=lambda: got.append(fast._runner_for(torch.device("cpu")))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and all(runner is made[0] for runner in got) and len(got) == 4


def test_a_compiled_model_through_the_runner() -> None:
    model, x = tiny_vit(), torch.randn(5, 3, 32, 32)
    fast = lampq_rt.compile(model, range_plan(model, x))
    assert fast.image_bytes == 17 * (64 + 256) and fast.graph_memory_bytes == 0 and fast.micro_batch == "auto"
    runner = GraphRunner(fast.model, micro_batch=2, capture=FakeCapture())
    with torch.inference_mode():
        wanted = fast(x)
    torch.testing.assert_close(runner(x), wanted)
    torch.testing.assert_close(runner(x[:3]), wanted[:3])
    fast._runner = runner
    assert fast.graph_memory_bytes == runner.memory_bytes > 0
    fast.micro_batch = None
    assert fast.graph_memory_bytes == 0, "another micro-batch needs other graphs"
