"""LampQ's iterative update (AAAI-26, section 4.4): exchange bits between layers while the whole model gets better.

Measured once for the widths as they are: each layer's relative error L = ||W_hat x_hat - W x||^2 / ||W x||^2, where x
comes from the quantised layers before it. What another width would make of it is estimated with the ratios of this
very quantiser's errors at its widths, rho(B) = L(B-1) / L(B):

    gain of one more bit         L(B) - L(B+1) = L(B) (1 - 1/rho(B+1))
    degradation of one bit less  L(B-1) - L(B) = L(B) (rho(B) - 1)

(the printed text has the names of the two exchanged). The printed swap, +1 here and -1 there, keeps only the
unweighted mean of the bits. Here a raise is paid for by as many lowerings as all budgets ask for. A swap stays if the
calibration images' accuracy (or agreement with the floating-point model) does not fall, of which 32 images resolve
only 3 points, and the divergence of `judge` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lampq_rt.calibrate.allocate.base import Problem
from lampq_rt.calibrate.judge import Answers, Judge
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import SimulatedLinear, Simulation

TRIALS = 30
"""Swaps tried in all, at the price of one run of the calibration images each."""

TOKEN_STRIDE = 8
"""Every so manyth row of a layer's input counts in its error."""

Progress = Callable[[int, int], None]

Curves = Mapping[str, Mapping[int, float]]
"""An error by site and width."""


@dataclass(frozen=True)
class Refinement:
    """What came of it.

    Attributes:
        bits: the widths, within the same budgets.
        facts: JSON-able summary: trials, accepted swaps, accuracy (percent), KL and divergence (nats) before and after.
    """

    bits: Mapping[str, int]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Swap:
    """One raise and the lowerings that pay for it, as new widths by site."""

    raised: str
    changes: Mapping[str, int]


def refine(
    simulation: Simulation,
    table: Mapping[str, Mapping[int, SiteParams]],
    problem: Problem,
    errors: Curves,
    start: Mapping[str, int],
    judge: Judge,
    *,
    trials: int = TRIALS,
    progress: Progress | None = None,
) -> Refinement:
    """Improve `start` by swaps that keep every budget of `problem`.

    Args:
        simulation: whose other sites are set as the plan will have them; the sites of `start` are set here.
        table: formats and steps of the sites of `start` by width.
        problem: widths, costs and limits.
        errors: relative error of each site by width on inputs in floating point.
        start: a width per site, within the budgets.
        judge: holds the calibration images.
        trials: swaps tried at most.
        progress: called with the number of swaps tried and `trials`.
    """
    bits = dict(start)
    simulation.set({name: table[name][width] for name, width in bits.items()})
    answers, relative = _measure(simulation, bits, judge, None)
    first, accepted, tried = answers, [], {tuple(bits.values())}
    done, improving = 0, True
    while improving and done < trials:
        improving = False
        growth = {name: _growth(found, errors[name][bits[name]]) for name, found in relative.items()}
        for swap in candidates(problem, bits, growth, errors):
            new = {**bits, **swap.changes}
            if tuple(new.values()) in tried:
                continue
            tried.add(tuple(new.values()))
            simulation.set({name: table[name][width] for name, width in swap.changes.items()})
            found, moved = _measure(simulation, new, judge, answers)
            done += 1
            if progress is not None:
                progress(done, trials)
            improving = found.beat(answers)
            if improving:
                accepted.append({"raised": swap.raised, "bits": dict(swap.changes), "divergence": found.divergence})
                bits, answers, relative = new, found, moved
            else:
                simulation.set({name: table[name][bits[name]] for name in swap.changes})
            if improving or done >= trials:
                break
    if progress is not None:
        progress(trials, trials)
    facts = {
        "trials": done,
        "accepted": accepted,
        "accuracy": [first.accuracy, answers.accuracy],
        "kl": [first.kl, answers.kl],
        "divergence": [first.divergence, answers.divergence],
    }
    return Refinement(bits, facts)


def candidates(
    problem: Problem, bits: Mapping[str, int], growth: Mapping[str, float], errors: Curves
) -> Iterator[Swap]:
    """Swaps within the budgets, the raise with the largest gain per cost first.

    Args:
        problem: widths, costs and limits.
        bits: the widths as they are.
        growth: measured error of each site at its width, over the one in `errors`.
        errors: relative errors by site and width.
    """
    gains, losses = {}, {}
    for name, width in bits.items():
        wider, narrower = _neighbours(problem, name, width)
        curve = errors[name]
        if wider is not None:
            gains[name] = growth[name] * (curve[width] - curve[wider])
        if narrower is not None:
            losses[name] = growth[name] * (curve[narrower] - curve[width])
    price = {name: max(_price(problem, bits, name), 1e-12) for name in gains}
    for name in sorted(gains, key=lambda n: (-gains[n] / price[n], n)):
        wider = _neighbours(problem, name, bits[name])[0]
        assert wider is not None
        others = {other: loss for other, loss in losses.items() if other != name}
        changes = _pay(problem, {**bits, name: wider}, others)
        if changes is not None:
            yield Swap(name, {name: wider, **changes})


def _pay(problem: Problem, bits: Mapping[str, int], losses: Mapping[str, float]) -> dict[str, int] | None:
    """Lowerings, one step each, that bring `bits` back within every budget at little loss; None where none do."""
    changes: dict[str, int] = {}
    while not problem.fits({**bits, **changes}):
        now = {**bits, **changes}
        best: tuple[float, str, int] | None = None
        for name in losses.keys() - changes.keys():
            narrower = _neighbours(problem, name, bits[name])[1]
            assert narrower is not None
            lowered = {**now, name: narrower}
            relief = sum(problem.excess(unit, now) - problem.excess(unit, lowered) for unit in problem.limits)
            if relief > 0.0:
                best = min(best or (float("inf"), "", 0), (losses[name] / relief, name, narrower))
        if best is None:
            return None
        changes[best[1]] = best[2]
    for name in sorted(changes, key=lambda n: (-losses[n], n)):  # what a later, larger lowering made needless
        fewer = {other: width for other, width in changes.items() if other != name}
        if problem.fits({**bits, **fewer}):
            changes = fewer
    return changes


def _neighbours(problem: Problem, name: str, width: int) -> tuple[int | None, int | None]:
    """The next wider and the next narrower width that the site may have."""
    widths = problem.penalties[name]
    return min((w for w in widths if w > width), default=None), max((w for w in widths if w < width), default=None)


def _price(problem: Problem, bits: Mapping[str, int], name: str) -> float:
    """What raising `name` takes of all budgets together, each as a share of its limit."""
    wider = _neighbours(problem, name, bits[name])[0]
    assert wider is not None
    raised = {**bits, name: wider}
    return sum((problem.cost(u, raised) - problem.cost(u, bits)) / limit for u, limit in problem.limits.items())


def _growth(measured: float, expected: float) -> float:
    """How many times as large as expected an error is; 1 where none is expected, in floating point."""
    return measured / max(expected, 1e-30) if expected > 0.0 else 1.0


@torch.no_grad()
def _measure(
    simulation: Simulation, bits: Mapping[str, int], judge: Judge, rival: Answers | None
) -> tuple[Answers, dict[str, float]]:
    """The model's answers, and each site's relative error in the same run: exact sums over all processes' batches."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in bits}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, SimulatedLinear)
            bias = 0.0 if module.bias is None else module.bias
            x, y_hat = (t.flatten(0, -2)[::TOKEN_STRIDE] for t in (inputs[0], output))
            y = F.linear(x, module.original.weight)
            error = (y_hat - bias - y).square().sum(dtype=torch.float64)
            seen[name].append((float(error), float(y.square().sum(dtype=torch.float64))))

        return see

    hooks = [simulation.module(name).register_forward_hook(hook(name)) for name in bits]
    try:
        answers = judge(simulation, rival)
    finally:
        for handle in hooks:
            handle.remove()
    relative = {}
    parts = judge.shard.objects(seen)
    for name in bits:
        errors, sizes = zip(*(pair for part in parts for pair in part[name]), strict=True)
        relative[name] = math.fsum(errors) / max(math.fsum(sizes), 1e-300)
    return answers, relative
