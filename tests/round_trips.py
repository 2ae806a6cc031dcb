"""What is written comes back: a compiled model and its plan, whatever formats they have."""

from __future__ import annotations

import copy
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt.compiler import CompiledModel
from lampq_rt.plan import Plan


def check_round_trips(
    model: nn.Module, plan: Plan, images: Tensor, folder: Path
) -> tuple[CompiledModel, dict[str, Tensor]]:
    """The compiled model, whose checkpoint and plan were written to `folder` and read again without a difference, and
    the tensors of the checkpoint by name."""
    fast = lampq_rt.compile(model, plan)
    fast.save(folder / "m.lampq")
    again = lampq_rt.load(folder / "m.lampq")
    with torch.inference_mode():
        answers = fast(images)
        assert torch.equal(again(images), answers) and torch.equal(copy.deepcopy(fast)(images), answers)
    left, right = fast.state_dict(), again.state_dict()
    assert list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)
    again.save(folder / "n.lampq")
    assert (folder / "m.lampq").read_bytes() == (folder / "n.lampq").read_bytes()
    plan.save(folder / "a.plan")
    loaded = Plan.load(folder / "a.plan")
    assert plan.diff(loaded) == [] and loaded.digest == plan.digest
    return fast, safetensors.torch.load_file(folder / "m.lampq")
