"""What the GPU's launchers do around a kernel: the device it starts on, its grid, the memory that launches share."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lampq_rt.kernels.gpu import impl  # noqa: E402
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
