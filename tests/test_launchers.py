"""What the GPU's launchers do around a kernel: the device it starts on, its grid, the memory that launches share."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lampq_rt.kernels.gpu import impl, offline, scratch  # noqa: E402
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


def test_grids_hold_any_batch() -> None:
    """Only the first axis takes more than 65,535 programs; heads of 6,000 images are more than that."""
    batch, heads, tokens, head_dim = 6000, 12, 17, 64

    def empty(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    vector, scale = empty(3 * heads * head_dim, dtype=torch.float32), empty(heads, dtype=torch.float32)
    q, v = empty(batch, heads, tokens, head_dim), empty(batch, heads, head_dim, 32)
    qkv = empty(batch, tokens, 3 * heads * head_dim, dtype=torch.float16)
    x_q, w_q = empty(batch, tokens, heads * head_dim), empty(3 * heads * head_dim, heads * head_dim)
    with offline.recording("sm90") as launches:
        impl.attention(q, q, v, scale, scale, 8, "rowmax", 1.0, 0, 8, torch.int8)
        impl.heads_quantize(qkv, False, None, None, None, None, 0.0, heads, vector, 8, 8)
        impl.layernorm_quantize(qkv, None, None, 1e-6, 1.0, 0, 8, torch.int8)
        impl.quantize(qkv, 1.0, 0, 8, torch.int8)
        impl.linear_qkv(x_q, w_q, vector, vector, None, heads, vector, 8, 8)
    assert len(launches) == 5
    for launch in launches:
        assert all(size <= 65535 for size in launch.grid[1:]), launch
