"""What the GPU's launchers do around a kernel: the device it starts on, its grid, the memory that launches share."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lampq_rt.kernels.gpu import impl, scratch  # noqa: E402
from lampq_rt.kernels.ops import SCHEMAS, TRITON  # noqa: E402


def test_kernels_start_where_their_tensors_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def device(index: torch.device) -> Any:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    for name, schema in SCHEMAS.items():
        monkeypatch.setattr(impl, name, lambda *args, last: (len(entered), last))
        assert schema.startswith("(Tensor"), "the device is that of the first argument"
        for where, guards in (("cuda:1", 0), ("cpu", 0), ("cuda:0", 1)):
            entered.clear()
            came = getattr(TRITON, name)(SimpleNamespace(device=torch.device(where)), 2, last=3)
            assert came == (guards, 3) and entered == [torch.device(where)] * guards


def test_memory_is_kept_for_the_default_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a side stream's launches leave behind would lie in whatever pool the caller allocates from."""
    zeros, current = torch.zeros, {"stream": "default"}
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current["stream"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(scratch, "_kept", {})
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    first = scratch.split_scratch(x, 100, 4)
    assert all(a is b for a, b in zip(first, scratch.split_scratch(x, 64, 2), strict=True))
    kept = dict(scratch._kept)
    current["stream"] = "side"
    one, two = (scratch.split_scratch(x, 100, 4) for _ in range(2))
    assert len({id(t) for t in (*first, *one, *two)}) == 6 and scratch._kept == kept
    with scratch.own_scratch():
        own = scratch.split_scratch(x, 100, 4)
        assert scratch.split_scratch(x, 100, 4)[0] is own[0], "a graph's launches follow each other"
    assert scratch._kept == kept
    other: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    current["stream"] = "default"
    assert scratch.split_scratch(other, 100, 4)[0] is not first[0]
