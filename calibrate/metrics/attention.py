"""What fewer bits in attention do to its output, weighted with the gradients there:

    1/2 * E_n sum over heads, tokens and channels of (dl/dy)^2 * (y_hat - y)^2,    y = softmax(q k^T / sqrt(d)) v,

the penalty of `fisher_output` for the two matmuls. Either is quantised alone: y_hat has q and k in few bits, or
softmax output and v. An error of a logit is felt in a whole row of the softmax, so that whole images are looked at,
a few of them, and not drawn rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.distributed import generator
from lampq_rt.calibrate.metrics.fisher import Progress, sample_labels
from lampq_rt.memory import trim
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedPV, SimulatedQK, SimulatedSite, Simulation
from lampq_rt.sites import Kind

IMAGES = 8
"""Images that are looked at, at most, spread evenly."""


@dataclass
class _Seen:
    """One block's attention: its modules, and what they were given for one image."""

    qk: SimulatedQK
    pv: SimulatedPV
    q: Tensor
    k: Tensor
    logits: Tensor
    v: Tensor
    squared: Tensor


def errors(
    simulation: Simulation,
    images: Tensor,
    table: Mapping[str, Mapping[int, SiteParams]],
    *,
    draws: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[int, float]]:
    """Penalties of the attention matmuls in the model as `simulation` is set.

    Args:
        simulation: in floating point, or quantised inside `context.straight_through`; left as it was.
        images: fp32 [n, C, H, W], normalised.
        table: formats and steps of the matmuls to judge, by width; QK^T and PV of a block both or neither.
        draws: labels drawn an image, from the model's answers.
        seed: of the labels.
        progress: called with the number of images done and of all.

    Returns:
        By site and width, nats.
    """
    device = next(simulation.parameters()).device
    count = min(IMAGES, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    found = {name: dict.fromkeys(row, 0.0) for name, row in table.items()}
    pairs = _pairs(simulation, table)
    for done, number in enumerate(chosen, 1):
        seen = _gradients(simulation, images[number : number + 1].to(device), pairs, draws, seed, number)
        with torch.no_grad():
            for (qk, pv), block in seen.items():
                for name in (qk, pv):
                    for bits, params in table[name].items():
                        found[name][bits] += _error(block, params) / count
        del seen
        trim()
        if progress is not None:
            progress(done, count)
    return found


def _pairs(simulation: Simulation, names: Mapping[str, object]) -> list[tuple[str, str]]:
    """QK^T and PV of each block."""
    sites = [site for site in simulation.description.sites if site.name in names]
    qks, pvs = ([s.name for s in sites if s.kind is kind] for kind in (Kind.QK, Kind.PV))
    return list(zip(qks, pvs, strict=True))


def _gradients(
    simulation: Simulation, image: Tensor, pairs: list[tuple[str, str]], draws: int, seed: int, number: int
) -> dict[tuple[str, str], _Seen]:
    """What attention was given for one image, with the squared gradients of its output, mean over draws."""
    seen: dict[tuple[str, str], _Seen] = {}
    outputs: list[Tensor] = []
    with ExitStack() as hooks, torch.enable_grad():
        for pair in pairs:
            qk, pv = map(simulation.module, pair)
            assert isinstance(qk, SimulatedQK) and isinstance(pv, SimulatedPV)
            nothing = torch.empty(0)
            block = _Seen(qk, pv, nothing, nothing, nothing, nothing, nothing)
            seen[pair] = block

            def see_qk(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, block: _Seen = block) -> None:
                block.q, block.k = (x.detach() for x in inputs)

            def see_pv(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, block: _Seen = block) -> None:
                block.logits, block.v = (x.detach() for x in inputs)
                outputs.append(output)

            for module, hook in ((qk, see_qk), (pv, see_pv)):
                hooks.callback(module.register_forward_hook(hook).remove)
        logits = simulation.model(image.detach().requires_grad_(True)).flatten(1)
        labels = sample_labels(logits, draws, generator(seed, number, "labels"))
        for row, label in enumerate(labels):
            loss = F.cross_entropy(logits, label)
            gradients = torch.autograd.grad(loss, outputs, retain_graph=row < draws - 1)
            for block, gradient in zip(seen.values(), gradients, strict=True):
                squared = gradient.square() / draws
                block.squared = squared if row == 0 else block.squared + squared
    return seen


def _error(block: _Seen, params: SiteParams) -> float:
    """Half of the weighted squared error with one of the matmuls in these formats, the other in floating point."""
    exact = _alone(block.pv, None, block.logits, block.v)
    if params.kind is Kind.QK:
        change = _alone(block.qk, params, block.q, block.k) - _alone(block.qk, None, block.q, block.k)
        came = _alone(block.pv, None, block.logits + change, block.v)
    else:
        came = _alone(block.pv, params, block.logits, block.v)
    return 0.5 * float((block.squared * (came - exact).square()).sum())


def _alone(module: SimulatedSite, params: SiteParams | None, *operands: Tensor) -> Tensor:
    """The module's output in these formats, past its hooks; it is left as it was."""
    before = module.params
    module.params = None if params is None or params.is_float else params
    try:
        result: Tensor = module.forward(*operands)
    finally:
        module.params = before
    return result
