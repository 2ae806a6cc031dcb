"""Reconstruction: what a finished plan rounds away is learned back, from images alone.

A step draws images and follows the gradient of

    blocks * mean over blocks of the objective + answers * KL(p || p_hat)

where the objective (`objectives`) counts how far what a block gives is from what it gives in the floating-point model,
rewritten as the quantised one was. Blocks learn together, with the whole quantised prefix as input, or one after the
other as in BRECQ (2102.05426): `orders`. Rounding is straight-through or AdaRound's (`learned_rounding`), steps learn
as in LSQ (`straight_through`), inputs may be left in floating point at random (`drop`); norms and biases learn, too.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lampq_rt.calibrate import stream
from lampq_rt.calibrate.drop import Drop
from lampq_rt.calibrate.learned_rounding import ROUNDINGS
from lampq_rt.calibrate.objectives import OBJECTIVES, First, Study
from lampq_rt.calibrate.observe import Progress
from lampq_rt.calibrate.orders import ORDERS, Course, Unit
from lampq_rt.calibrate.resume import Resume
from lampq_rt.calibrate.schedule import Schedule
from lampq_rt.calibrate.straight_through import LearningLinear, held, learning, learning_matmuls
from lampq_rt.errors import DataError
from lampq_rt.evaluate import kl_divergence
from lampq_rt.plan import SiteParams, update_digest, weights_digest
from lampq_rt.simulate import Simulation

WARM_UP = 10
"""Steps in which the rates rise."""

LEAST_SHARE = 0.5
"""Of its rates that a plan is trained at which hardly diverges."""

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
    teacher: nn.Module | None = None,
) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
    """Learn codes, steps, biases and norms.

    Args:
        model: in floating point, rewritten as `quantised` was.
        quantised: set to the plan; used up.
        images: fp32 [n, C, H, W], normalised, on the simulation's device.
        schedule: what is trained, how long and how fast.
        seed: of drawn images and their changes.
        progress: called with steps done and their number.
        teacher: what to learn from, where that is not `model` (`prepare.Prepared`).
        resume: file that keeps the state; where it is there, of the same work, the stage goes on from it.

    Returns:
        Sites that learned, and fp32 parameters by name (norms and biases).

    Raises:
        DataError: `resume` is the state of other work, or cannot be written; the loss is not finite.
    """
    origin = _frozen(model, images.device)
    exact = origin if teacher is None or teacher is model else _frozen(teacher, images.device)
    state, digest = Resume(resume), _digest(quantised, (origin, exact), images, schedule, seed)
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: schedule.statistics]
    some = images[drawn.to(images.device)]
    share = _share_of_rates(schedule, exact, quantised, some)
    precision = product_precision(images.device)
    linears = learning(quantised, precision)
    _start_near(linears, origin, schedule.edge)
    rest = _rest(quantised.model)
    matmuls = learning_matmuls(quantised)
    begin, tensors = state.load(digest)
    first = First({name.removeprefix("first."): t for name, t in tensors.items() if name.startswith("first.")})
    study = Study(_vit(exact), _vit(quantised.model), some, first)
    error = OBJECTIVES.get(schedule.objective).measure(study)  # before `_restore_model`: of the model as it came
    course = Course(
        study.exact, study.quantised, linears, matmuls, rest, images, error,
        schedule.steps, schedule.batch, schedule.blocks, schedule.answers, seed, precision,
        schedule.finish, schedule.finish_rates,
    )  # fmt: skip
    training = _Training(course, schedule, share, first, state, digest, progress)
    training.run(begin, tensors)
    sites = {name: linear.learned() for name, linear in linears.items()}
    sites.update({name: matmul.learned() for name, matmul in matmuls.items()})
    return sites, {name: parameter.detach().float().cpu().clone() for name, parameter in rest.items()}


class _Training:
    """The steps of a course, one unit after the other."""

    def __init__(
        self,
        course: Course,
        schedule: Schedule,
        share: float,
        first: First,
        state: Resume,
        digest: str,
        progress: Progress | None,
    ) -> None:
        self.course, self.schedule, self.share, self.first = course, schedule, share, first
        self.state, self.digest, self.progress = state, digest, progress
        self.order, self.rounding = ORDERS.get(schedule.order), ROUNDINGS.get(schedule.rounding)
        self.steps = self.order.steps(course)
        *self.starts, self.total = accumulate(self.steps, initial=0)
        self.drop = Drop(schedule.drop)
        for linear in course.linears.values():
            linear.drop = self.drop if schedule.drop else None

    def run(self, begin: int, tensors: Mapping[str, Tensor]) -> None:
        """All steps from `begin` on, which `tensors` are the state of."""
        _restore_model(self._model(), tensors)
        for number, unit in enumerate(self.order.units(self.course)):
            done = begin - self.starts[number]
            if done < self.steps[number]:
                self._train(unit, number, max(done, 0), tensors)

    def _train(self, unit: Unit, number: int, begin: int, tensors: Mapping[str, Tensor]) -> None:
        """One unit; `tensors` are its state if `begin` is not 0."""
        count, before, linears = self.steps[number], self.starts[number], list(unit.linears.values())
        self.rounding.begin(linears)
        optimiser = torch.optim.Adam(self._groups(unit), betas=(0.9, 0.99))
        rates = [group["lr"] for group in optimiser.param_groups]
        _restore(optimiser, tensors, begin)
        steps = range(begin, count if _learners(optimiser) else 0)
        for step in steps:
            now = self.share * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * step / count))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * now
            optimiser.zero_grad(set_to_none=True)
            self._gradients(unit, number, step)
            optimiser.step()
            done = before + step + 1
            if done % KEEP_EVERY == 0 and step + 1 < count:
                self._save(done, _kept(optimiser))
            if self.progress is not None:
                self.progress(done, self.total)
        self.rounding.finish(linears)
        if number + 1 < len(self.steps):
            self._save(before + count, {})

    def _gradients(self, unit: Unit, number: int, step: int) -> None:
        """Those of a step."""
        place = self.course.seed * self.total + self.starts[number] + step
        parts = unit.draw(torch.Generator().manual_seed(place))
        count, size = sum(len(part[0]) for part in parts), 0.0
        with held(unit.linears.values()):
            for index, part in enumerate(parts):
                with self.drop.at(place * len(parts) + index, part[0].device):
                    loss = unit.loss(part)
                value = float(loss.detach())
                if not math.isfinite(value):
                    at = place - self.course.seed * self.total + 1
                    raise DataError(f"the training diverged: its loss is {value} at step {at}; choose more bits")
                size = self.first.of(f"unit.{number}", loss)
                (loss * len(part[0]) / count).backward()  # type: ignore[no-untyped-call]
        penalty = self.rounding.penalty(unit.linears.values(), step / self.steps[number])
        if penalty is not None:
            (penalty * (size / unit.blocks)).backward()  # type: ignore[no-untyped-call]

    def _groups(self, unit: Unit) -> list[dict[str, Any]]:
        """What learns, and how fast."""
        linears, rounding, rates = unit.linears.values(), self.rounding, unit.rates or self.schedule
        factors = [p for m in linears for p in (*rounding.steps(m), m.log_input_step) if p is not None]
        factors += [p for m in unit.matmuls.values() for p in m.log_steps.values()]
        return [
            {"params": [p for m in linears for p in rounding.weights(m)], "lr": getattr(rates, rounding.rate)},
            {"params": factors, "lr": rates.factors},
            {"params": list(unit.rest.values()), "lr": rates.rest},
        ]

    def _model(self) -> dict[str, nn.Parameter]:
        """What the state holds beside the unit that trains: all that learns, where there are several units."""
        if len(self.steps) == 1:
            return {}
        found = dict(self.course.rest)
        for name, linear in self.course.linears.items():
            own = {"codes": linear.codes, "weight": linear.log_weight_step, "input": linear.log_input_step}
            found.update({f"{name}.{leaf}": p for leaf, p in own.items() if p is not None})
        for name, matmul in self.course.matmuls.items():
            found.update({f"{name}.{leaf}": p for leaf, p in matmul.log_steps.items()})
        return found

    def _save(self, done: int, kept: Mapping[str, Tensor]) -> None:
        model = {f"model.{name}": parameter.detach().clone() for name, parameter in self._model().items()}
        first = {f"first.{name}": value for name, value in self.first.values.items()}
        self.state.save(self.digest, done, {**kept, **model, **first})


@torch.no_grad()
def _share_of_rates(schedule: Schedule, exact: nn.Module, quantised: nn.Module, images: Tensor) -> float:
    """What the rates are multiplied by, at most 1; measured on those images.

    Adam's steps have the size of the rate whatever the gradient's. What is to be mended is of the size of the error,
    whose square the divergence is; steps much larger than that only scatter codes that were right.
    """
    if not schedule.full_rates:
        return 1.0
    parts = images.split(stream.GRAPH)
    mean = float(torch.cat([kl_divergence(exact(part), quantised(part)) for part in parts]).mean())
    return min(1.0, max(LEAST_SHARE, math.sqrt(max(mean, 0.0) / schedule.full_rates)))


def _vit(model: nn.Module) -> VisionTransformer:
    return cast(VisionTransformer, model)


def product_precision(device: torch.device) -> torch.dtype:
    """Of the factors of products while training: bfloat16 where the machine multiplies it faster, else float32.

    A product of quantised numbers moves by a 500th, where quantisation at 4 bits moves it by a tenth.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported()  # type: ignore[attr-defined]
    return torch.bfloat16 if fast else torch.float32


@torch.no_grad()
def _frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """An fp32 copy on that device."""
    return copy.deepcopy(model).float().eval().requires_grad_(False).to(device)


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


@torch.no_grad()
def _restore_model(model: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Undo what `_Training._save` kept of the model; nothing where there is no state."""
    for name, parameter in model.items():
        if tensors:
            parameter.copy_(tensors[f"model.{name}"])


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


def _digest(quantised: Simulation, models: tuple[nn.Module, ...], images: Tensor, schedule: Schedule, seed: int) -> str:
    """SHA-256 of everything that the outcome depends on, hexadecimal."""
    precision = product_precision(images.device)
    digest = hashlib.sha256(f"{schedule.facts()}|{seed}|{torch.__version__}|{precision}|".encode())
    for model in (*dict.fromkeys(models), quantised.model):
        digest.update(weights_digest(model).encode())
    for site in quantised.description.sites:
        params = quantised.module(site.name).params
        for key, tensor in sorted(params.tensors.items()) if params is not None else ():
            update_digest(digest, f"{site.name}.{key}", tensor)
    update_digest(digest, "images", images)
    return digest.hexdigest()
