"""Where a long stage stands, in a file: started again with the same arguments, it goes on there.

One safetensors file, whole or absent, with the step reached and a digest of everything that the stage depends on. A
file of other work is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lampq_rt.errors import DataError
from lampq_rt.files import read_file, write_file

LIMIT = 1 << 34
"""Bytes; no state of a Vision Transformer is larger."""

_STEP, _DIGEST = "step", "lampq.digest"


class Resume:
    """The state of one stage.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def load(self, digest: str) -> tuple[int, dict[str, Tensor]]:
        """Step reached and state; 0 and nothing where there is no file.

        Raises:
            DataError: the file cannot be read, or holds other work.
        """
        if self.path is None or not self.path.exists():
            return 0, {}
        data = read_file(self.path, what="state", error=DataError, limit=LIMIT)
        try:
            tensors = load(data)
        except SafetensorError as cause:
            raise DataError(f"{self.path}: not a state of a calibration ({cause}); remove it to begin anew") from None
        mark = [name for name in tensors if name.startswith(f"{_DIGEST}:")]
        if _STEP not in tensors or len(mark) != 1:
            raise DataError(f"{self.path}: not a state of a calibration; give another name or remove it")
        if mark[0] != f"{_DIGEST}:{digest}":
            raise DataError(
                f"{self.path} is the state of another model, plan, schedule or set of images; remove it to begin anew"
            )
        step = int(tensors.pop(_STEP))
        del tensors[mark[0]]
        return step, tensors

    def save(self, digest: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state.

        Raises:
            DataError: the file could not be written.
        """
        if self.path is None:
            return
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        facts = {_STEP: torch.tensor(step), f"{_DIGEST}:{digest}": torch.zeros(0)}
        write_file(self.path, save({**kept, **facts}), what="state", error=DataError)
