"""GELU to ReLU: fc1 and fc2 of an MLP learn to give with a ReLU what they gave with a GELU (APHQ-ViT, 2504.02508;
GLF-Q, 2026).

A ReLU is free where integers run: codes whose least value is 0 clip it away, so that no kernel computes it. And its
output has one tail, which few bits hold better. It is no function-preserving rewrite: the model with ReLUs answers
differently, and is compared with the model that it came from all the way (`Measurements`, `reconstruct`).

For every MLP alone, fed what the original gives it: fc2 by ridge regression first, then both linears by Adam against
the squared error. The papers clamp the ReLU's output to a percentile in a second term, for the sake of uniform steps;
here steps and tables are searched on what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate import spd
from lampq_rt.calibrate.transforms.base import Mlp, mlps, watch
from lampq_rt.edits import ACTIVATIONS
from lampq_rt.sites import Description

ROWS = 16_384
"""Inputs of an MLP that are kept to learn from: all tokens of few images, some of many."""

BATCH = 2_048
"""Rows of a step."""

RATE = 0.02
"""Of Adam at the start, in times the RMS of the parameter; it falls to 0 along a cosine. (2 % of a weight; the papers'
4e-5 is for 20,000 steps.)"""

RIDGE = 0.01
"""Of the regression, in times the mean variance of a channel."""


def to_relu(
    model: nn.Module,
    description: Description,
    images: Tensor,
    steps: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> str | None:
    """Replace the GELUs of the MLPs that can be quantised, in `model` itself.

    Args:
        model: in floating point, frozen.
        description: of it.
        images: fp32 [n, C, H, W], normalised, to learn from; a hundred or more: fc2 alone has as many unknowns an
            output as fc1 has channels.
        steps: of each MLP.
        seed: of the rows that are drawn.
        progress: called with MLPs done and their number.

    Returns:
        None, or why the model stayed as it was.
    """
    found = [mlp for mlp in mlps(model, description) if not isinstance(_module(model, mlp).act, nn.ReLU)]
    if not found:
        return "it has no MLP with LayerNorm, biases and another activation than ReLU"
    inputs = {mlp.name: _Rows(len(images), seed) for mlp in found}
    watch(model, images, {f"{name}.fc1": rows.see for name, rows in inputs.items()})
    for number, mlp in enumerate(found):
        _learn(_module(model, mlp), inputs.pop(mlp.name).kept(), steps, seed)
        if progress is not None:
            progress(number + 1, len(found))
    return None


class _Rows:
    """Some tokens of every image, the same number of each, drawn by the seed; the class token is among them."""

    def __init__(self, images: int, seed: int) -> None:
        self.each = max(2, ROWS // images)
        self.source = torch.Generator().manual_seed(seed)
        self.parts: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """[B, N, K]."""
        drawn = torch.randperm(x.shape[1] - 1, generator=self.source)[: self.each - 1] + 1
        self.parts.append(x[:, [0, *drawn.tolist()]].flatten(0, 1).clone())

    def kept(self) -> Tensor:
        """[rows, K]."""
        return torch.cat(self.parts)


def _module(model: Any, mlp: Mlp) -> Any:
    return model.get_submodule(mlp.name)


def _learn(mlp: Any, x: Tensor, steps: int, seed: int) -> None:
    """Replace one activation; x: [rows, K], the inputs of fc1."""
    with torch.no_grad():
        wanted = torch.cat([mlp(part) for part in x.split(BATCH)])
        spread = (wanted - wanted.mean(0)).square().mean().clamp(min=1e-12)
        mlp.act = ACTIVATIONS["relu"]()
        _regress(mlp, x, wanted)
    learners = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    groups = [{"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt().clamp(min=1e-4))} for p in learners]
    source = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for parameter in learners:
            parameter.requires_grad_(True)
        optimiser = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
        for _ in range(steps):
            drawn = torch.randint(len(x), (BATCH,), generator=source).to(x.device)
            loss = (mlp(x[drawn]) - wanted[drawn]).square().mean() / spread
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    for parameter in learners:
        parameter.requires_grad_(False).grad = None


def _regress(mlp: Any, x: Tensor, wanted: Tensor) -> None:
    """Give fc2 the weight and bias of least squared error, pulled towards its old weight."""
    width, outputs = mlp.fc2.in_features, mlp.fc2.out_features
    old = mlp.fc2.weight.double()
    squares = torch.zeros(width, width, dtype=torch.float64, device=x.device)
    products = squares.new_zeros(outputs, width)
    hidden_sum, rest_sum = squares.new_zeros(width), squares.new_zeros(outputs)
    for part, target in zip(x.split(BATCH), wanted.split(BATCH), strict=True):
        hidden = F.relu(mlp.fc1(part)).double()
        rest = target.double() - hidden @ old.T
        squares += hidden.T @ hidden
        products += rest.T @ hidden
        hidden_sum += hidden.sum(0)
        rest_sum += rest.sum(0)
    mean, rest_mean = hidden_sum / len(x), rest_sum / len(x)
    covariance = squares / len(x) - torch.outer(mean, mean)
    change = spd.ridge(covariance, products / len(x) - torch.outer(rest_mean, mean), RIDGE).double()
    mlp.fc2.weight.copy_(old + change)
    mlp.fc2.bias.copy_(rest_mean - change @ mean)
