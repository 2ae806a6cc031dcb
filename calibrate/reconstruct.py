"""Reconstruction: what a finished plan rounds away is learned back, from images alone.

All blocks learn together. A step draws images, changes each at random (crop, aspect, flip: an image needs no label,
for the floating-point model says what is right), and follows the gradient of

    blocks * mean over blocks of ||y_hat - y||^2 / ||y - mean(y)||^2  +  answers * KL(p || p_hat)

where y is what the block gives in the floating-point model, rewritten as the quantised one was: block reconstruction
(BRECQ, 2102.05426) with the whole quantised prefix as input, and block losses through the rest of the model. Rounding
is straight-through, its steps learn as in LSQ (`straight_through`); norms and biases learn, too.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.observe import Progress
from lampq_rt.calibrate.resume import Resume
from lampq_rt.calibrate.straight_through import LearningLinear, LearningMatmul, learning, learning_matmuls
from lampq_rt.errors import DataError
from lampq_rt.plan import SiteParams, update_digest, weights_digest
from lampq_rt.simulate import Simulation


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of Adam; 0 leaves the plan as it is.
        batch: images a step.
        codes: learning rate of weights, in codes a step.
        factors: of logarithms of steps.
        rest: of norms and biases.
        blocks: weight of the blocks' errors.
        answers: weight of the answers' divergence.
        edge: how far from its code a weight may start: it is that of the floating-point model, moved so near that it
            still rounds to the code of the plan.
    """

    steps: int = 0
    batch: int = 16
    codes: float = 0.005
    factors: float = 1e-3
    rest: float = 5e-4
    blocks: float = 10.0
    answers: float = 0.3
    edge: float = 0.45


WARM_UP = 10
"""Steps in which the rates rise."""

SMALLEST_CROP = 0.55
"""Least share of a side that a random crop keeps."""

LARGEST_ASPECT = 0.2
"""Greatest logarithm of a crop's change of aspect."""


GRAPH = 4
"""Images whose activations are in memory at once."""

KEEP_EVERY = 20
"""Steps between two states kept."""


def reconstruct(
    model: nn.Module,
    quantised: Simulation,
    images: Tensor,
    schedule: Schedule,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    resume: Path | None = None,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Learn codes, steps, biases and norms.

    Args:
        model: in floating point, rewritten as `quantised` was.
        quantised: set to the plan; used up.
        images: fp32 [n, C, H, W], normalised, on the simulation's device.
        schedule: how long and how fast.
        seed: of drawn images and their changes.
        progress: called with steps done and their number.
        resume: file that keeps the state; where it is there, of the same work, the stage goes on from it.

    Returns:
        Sites that learned, and fp32 parameters by name (norms and biases).

    Raises:
        DataError: `resume` is the state of other work, or cannot be written; the loss is not finite.
    """
    state, exact = Resume(resume), copy.deepcopy(model).float().eval().requires_grad_(False).to(images.device)
    digest = _digest(quantised, exact, images, schedule, seed)
    precision = product_precision(images.device)
    linears = learning(quantised, precision)
    _start_near(linears, exact, schedule.edge)
    rest = _rest(quantised.model)
    matmuls = learning_matmuls(quantised)
    optimiser = torch.optim.Adam(_groups(linears, matmuls, rest, schedule), betas=(0.9, 0.99))
    rates = [group["lr"] for group in optimiser.param_groups]
    begin, tensors = state.load(digest)
    _restore(optimiser, tensors, begin)
    for step in range(begin, schedule.steps):
        draws = torch.Generator().manual_seed(seed * schedule.steps + step)
        share = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / schedule.steps))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        drawn = torch.randperm(len(images), generator=draws)[: schedule.batch]
        seen = augmented(images[drawn.to(images.device)], draws)
        optimiser.zero_grad(set_to_none=True)
        for linear in linears.values():
            linear.hold()
        for part in seen.split(GRAPH):
            loss = _loss(exact, quantised.model, part, schedule, precision) * len(part) / len(seen)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DataError(f"the training diverged: its loss is {value} at step {step + 1}; choose more bits")
            loss.backward()  # type: ignore[no-untyped-call]
        for linear in linears.values():
            linear.release()
        optimiser.step()
        if (step + 1) % KEEP_EVERY == 0 and step + 1 < schedule.steps:
            state.save(digest, step + 1, _kept(optimiser))
        if progress is not None:
            progress(step + 1, schedule.steps)
    sites = {name: module.learned() for name, module in {**linears, **matmuls}.items()}
    return sites, {name: parameter.detach().float().cpu().clone() for name, parameter in rest.items()}


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """fp32 [B, C, H, W], each image cropped, stretched and flipped at random, to the same size."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draws)

    side, stretch = uniform(SMALLEST_CROP, 1.0), uniform(-LARGEST_ASPECT, LARGEST_ASPECT).exp()
    place = torch.zeros(count, 2, 3)
    for axis, extent in enumerate(((side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0))):
        place[:, axis, axis] = extent
        place[:, axis, 2] = uniform(-1.0, 1.0) * (1.0 - extent)
    place[:, 0, 0] *= torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    grid = F.affine_grid(place, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def product_precision(device: torch.device) -> torch.dtype:
    """Of the factors of products while training: bfloat16 where the machine multiplies it faster, else float32.

    A product of quantised numbers moves by a 500th, where quantisation at 4 bits moves it by a tenth.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # type: ignore[attr-defined]
    return torch.bfloat16 if fast else torch.float32


def _loss(exact: nn.Module, quantised: nn.Module, images: Tensor, schedule: Schedule, precision: torch.dtype) -> Tensor:
    """See the top of the file."""
    with torch.no_grad(), torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        wanted, targets = _blocks(exact, images)
    wanted, targets = wanted.float(), [target.float() for target in targets]
    found, outputs = _blocks(quantised, images)
    loss = schedule.answers * F.kl_div(
        found.flatten(1).log_softmax(-1), wanted.flatten(1).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    for y_hat, y in zip(outputs, targets, strict=True):
        spread = (y - y.mean(-1, keepdim=True)).square().mean()
        loss = loss + schedule.blocks / len(targets) * F.mse_loss(y_hat, y) / spread
    return loss


def _blocks(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what every block gives."""
    outputs: list[Tensor] = []
    blocks: Any = model.blocks
    handles = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in blocks]
    try:
        return model(images), outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _start_near(linears: Mapping[str, LearningLinear], exact: nn.Module, edge: float) -> None:
    """Move weights from their codes towards the floating-point ones, as far as the codes stay the same."""
    for name, linear in linears.items():
        weight: Any = exact.get_submodule(name).weight
        linear.start_near(weight.flatten(1), edge)


def _rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """Norms and biases, by their names in the model that plans edit."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            found.update({f"{name}.{leaf}": parameter for leaf, parameter in module.named_parameters()})
        elif isinstance(module, LearningLinear) and module.bias is not None:
            found[f"{name}.bias"] = module.bias
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _groups(
    linears: Mapping[str, LearningLinear],
    matmuls: Mapping[str, LearningMatmul],
    rest: Mapping[str, nn.Parameter],
    schedule: Schedule,
) -> list[dict[str, Any]]:
    factors = [p for m in linears.values() for p in (m.log_weight_step, m.log_input_step) if p is not None]
    factors += [p for m in matmuls.values() for p in m.log_steps.values()]
    return [
        {"params": [m.codes for m in linears.values()], "lr": schedule.codes},
        {"params": factors, "lr": schedule.factors},
        {"params": list(rest.values()), "lr": schedule.rest},
    ]


def _learners(optimiser: torch.optim.Adam) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _kept(optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    """Parameters and Adam's moments, by number."""
    found: dict[str, Tensor] = {}
    for number, parameter in enumerate(_learners(optimiser)):
        found[f"{number}"] = parameter
        found.update({f"{number}.{key}": value for key, value in optimiser.state[parameter].items()})
    return found


@torch.no_grad()
def _restore(optimiser: torch.optim.Adam, tensors: Mapping[str, Tensor], step: int) -> None:
    """Undo `_kept`."""
    if not step:
        return
    for number, parameter in enumerate(_learners(optimiser)):
        parameter.copy_(tensors[f"{number}"])
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{number}.")}
        optimiser.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in own.items()}


def _digest(quantised: Simulation, exact: nn.Module, images: Tensor, schedule: Schedule, seed: int) -> str:
    """SHA-256 of everything that the outcome depends on, hexadecimal."""
    precision = product_precision(images.device)
    digest = hashlib.sha256(f"{asdict(schedule)}|{seed}|{torch.__version__}|{precision}|".encode())
    digest.update(weights_digest(exact).encode() + weights_digest(quantised.model).encode())
    for site in quantised.description.sites:
        params = quantised.module(site.name).params
        for key, tensor in sorted(params.tensors.items()) if params is not None else ():
            update_digest(digest, f"{site.name}.{key}", tensor)
    update_digest(digest, "images", images)
    return digest.hexdigest()
