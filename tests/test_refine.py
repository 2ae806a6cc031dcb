"""The iterative update: its formulas, its budgets, and that it only ever improves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lampq_rt import backends
from lampq_rt.calibrate.allocate import Problem
from lampq_rt.calibrate.judge import Judge
from lampq_rt.calibrate.observe import observe
from lampq_rt.calibrate.refine import candidates, refine
from lampq_rt.calibrate.steps import searched
from lampq_rt.simulate import Simulation
from lampq_rt.sites import BLOCK_LINEARS
from tests.plans import by_width

WIDTHS = (2, 3, 4, 5)
SIZES = {"qkv": 3, "proj": 1, "fc1": 4, "fc2": 4}


def toy(limits: dict[str, float]) -> Problem:
    costs = {
        "mean_bits": {n: {b: size * b / 12 for b in WIDTHS} for n, size in SIZES.items()},
        "weight_bytes": {n: {b: size * (4.0 if b <= 4 else 8.0) for b in WIDTHS} for n, size in SIZES.items()},
    }
    zero = {n: dict.fromkeys(WIDTHS, 0.0) for n in SIZES}
    return Problem(zero, {u: costs[u] for u in limits}, limits, {})


def errors(ratio: float = 4.0) -> dict[str, dict[int, float]]:
    return {n: {b: ratio**-b for b in WIDTHS} for n in SIZES}


def test_gain_and_degradation_follow_the_measured_ratios() -> None:
    """gain = L (1 - 1/rho), degradation = L (rho - 1): with equal sizes and ratios, the largest L is raised, the
    smallest pays."""
    problem = toy({"mean_bits": 4.0})
    equal = {n: {b: b / 4 for b in WIDTHS} for n in SIZES}
    problem = Problem(problem.penalties, {"mean_bits": equal}, {"mean_bits": 4.0}, {})
    growth = {"qkv": 0.1, "proj": 0.4, "fc1": 0.2, "fc2": 0.05}
    swaps = list(candidates(problem, dict.fromkeys(SIZES, 4), growth, errors()))
    assert [s.raised for s in swaps] == ["proj", "fc1", "qkv", "fc2"]
    assert [s.changes for s in swaps[:3]] == [{n: 5, "fc2": 3} for n in ("proj", "fc1", "qkv")]
    assert swaps[3].changes == {"fc2": 5, "qkv": 3}
    cliff = {2: 1e3, 3: 1.0, 4: 4.0**-4, 5: 0.9 * 4.0**-4}  # below 4 bits; little to gain above
    steep = errors() | {"fc2": cliff}
    swaps = list(candidates(problem, dict.fromkeys(SIZES, 4), growth, steep))
    assert all(s.changes.get("fc2") != 3 for s in swaps) and swaps[-1].raised == "fc2"


@pytest.mark.parametrize(
    ("limits", "affordable"),
    [
        ({"mean_bits": 4.0}, set(SIZES)),
        ({"mean_bits": 3.9, "weight_bytes": 56.0}, {"proj", "fc2"}),
        ({"weight_bytes": 48.0}, {"fc2"}),
    ],
)
def test_every_candidate_keeps_every_budget(limits: dict[str, float], affordable: set[str]) -> None:
    problem = toy(limits)
    start = {"qkv": 4, "proj": 4, "fc1": 4, "fc2": 3}
    assert problem.fits(start)
    swaps = list(candidates(problem, start, dict.fromkeys(SIZES, 0.1), errors()))
    assert all(problem.fits({**start, **swap.changes}) for swap in swaps)
    assert {swap.raised for swap in swaps} == affordable


def test_a_raise_is_paid_for_by_as_many_lowerings_as_it_takes_and_no_more() -> None:
    """One more bit for fc1 costs 4 units: qkv and proj together, or fc2 alone, never fc2 and another."""
    problem = toy({"mean_bits": 4.0})
    growth = {"qkv": 0.001, "proj": 0.0001, "fc1": 0.5, "fc2": 0.4}
    swap = next(s for s in candidates(problem, dict.fromkeys(SIZES, 4), growth, errors()) if s.raised == "fc1")
    assert swap.changes == {"fc1": 5, "qkv": 3, "proj": 3}
    growth["fc2"] = 0.0011
    swap = next(s for s in candidates(problem, dict.fromkeys(SIZES, 4), growth, errors()) if s.raised == "fc1")
    assert swap.changes == {"fc1": 5, "fc2": 3} or swap.changes == {"fc1": 5, "qkv": 3, "proj": 3}


def test_slack_is_spent_without_lowering_anything() -> None:
    swaps = list(candidates(toy({"mean_bits": 4.5}), dict.fromkeys(SIZES, 4), dict.fromkeys(SIZES, 0.1), errors()))
    assert all(list(s.changes) == [s.raised] for s in swaps)


@dataclass
class Recorder:
    done: list[int] = field(default_factory=list)

    def __call__(self, done: int, total: int) -> None:
        self.done.append(done)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_whole_model_gets_no_worse_and_keeps_its_budget(labelled: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    images = torch.randn(8, 3, 32, 32)
    simulation = Simulation(model)
    linears = [s for s in simulation.description.sites if s.kind in BLOCK_LINEARS]
    names = [s.name for s in linears]
    menu = {s.name: [backends.formats(s.kind, b) for b in WIDTHS] for s in linears}
    table = by_width(searched(simulation, observe(simulation, images, seed=0, rows=128), menu, "minmax"))
    with torch.no_grad():
        judge = Judge(images, model(images), torch.arange(8) if labelled else None, 8)
    total = sum(s.params for s in linears)
    costs = {"mean_bits": {s.name: {b: s.params * b / total for b in WIDTHS} for s in linears}}
    problem = Problem({n: dict.fromkeys(WIDTHS, 0.0) for n in names}, costs, {"mean_bits": 3.0}, {})
    flat = {n: {b: 4.0**-b for b in WIDTHS} for n in names}
    seen = Recorder()
    start = dict.fromkeys(names, 3)
    found = refine(simulation, table, problem, flat, start, judge, trials=12, progress=seen)
    assert problem.fits(found.bits)
    assert list(found.bits) == names
    facts = found.facts
    assert facts["trials"] <= 12 and max(seen.done) == 12
    assert facts["divergence"][1] <= facts["divergence"][0] and facts["accuracy"][1] >= facts["accuracy"][0]
    assert (dict(found.bits) == start) == (not facts["accepted"])
    steps = [a["divergence"] for a in facts["accepted"]]
    assert steps == sorted(steps, reverse=True)
    simulation.set({n: table[n][w] for n, w in found.bits.items()})
    assert judge(simulation).divergence == pytest.approx(facts["divergence"][1])
    again = refine(simulation, table, problem, flat, start, judge, trials=12)
    assert again == found
