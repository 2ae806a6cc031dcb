"""Weights, inputs and attention with widths of their own: the choice, its budgets, its penalties, and what runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lampq_rt
from lampq_rt import adapters, backends
from lampq_rt.calibrate import RECIPES, Budget, Calibration, calibrate
from lampq_rt.calibrate.allocate import ALLOCATORS, Problem
from lampq_rt.calibrate.costs import COSTS, total
from lampq_rt.calibrate.metrics import PENALTIES, attention
from lampq_rt.calibrate.metrics.fisher_output import output
from lampq_rt.calibrate.metrics.measured import corrections
from lampq_rt.calibrate.prepare import finished
from lampq_rt.calibrate.recipes import Preparation, Recipe
from lampq_rt.calibrate.replay import Replay
from lampq_rt.calibrate.variables import Variable, free, tied
from lampq_rt.errors import BudgetError, FormatError
from lampq_rt.formats import Format
from lampq_rt.plan import Plan, SiteParams
from lampq_rt.simulate import Simulation
from lampq_rt.sites import BLOCK_LINEARS, Description, Kind
from tests.latency_tables import hand_made
from tests.plans import assert_paths_agree, tiny_vit

W, A = "mean_bits", "mean_activation_bits"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit(depth=1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(model: nn.Module, images: Tensor) -> Calibration:
    table = hand_made(model, (3, 32, 32), [8], lambda call, batch: 4.0 if call.op.startswith("aten::linear") else 1.0)
    return calibrate(model, images, latency_table=table)


@pytest.fixture(scope="module")
def description(model: nn.Module) -> Description:
    return adapters.describe(model)


def narrowed(problem: Problem, widths: Sequence[int]) -> Problem:
    """The same with these widths alone."""

    def few(table: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
        return {name: {w: row[w] for w in widths} for name, row in table.items()}

    costs = {unit: few(table) for unit, table in problem.costs.items()}
    return replace(problem, penalties=few(problem.penalties), costs=costs)


def sloped(variables: Sequence[Variable]) -> dict[str, dict[int, float]]:
    """Penalties that differ by variable, without any data."""
    return {
        v.name: {w: (1 + 7 * i % 5) * v.site.params**0.5 * 4.0**-w for w in range(2, 9)}
        for i, v in enumerate(variables)
    }


def test_variables_of_a_model(description: Description) -> None:
    names = [v.name for v in free(description.sites)]
    assert names == [
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.input",
        "blocks.0.attn.qk",
        "blocks.0.attn.pv",
        *(
            f"blocks.0.{name}.{operand}"
            for name in ("attn.proj", "mlp.fc1", "mlp.fc2")
            for operand in ("weight", "input")
        ),
    ]
    assert [v.name for v in tied(description.sites)] == [s.name for s in description.sites if s.kind in BLOCK_LINEARS]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_activations_of_one_width_have_that_mean(model: nn.Module, description: Description, bits: int) -> None:
    cost = COSTS.get(A)(model, description)
    assert sum(cost.of(s, backends.formats(s.kind, bits)) for s in description.sites) == pytest.approx(bits)


def test_activations_count_as_often_as_they_are_multiplied(model: nn.Module, description: Description) -> None:
    """By hand: 17 tokens, 64 channels; a wider weight changes nothing, and tied linears have the mean of weights."""
    cost, weights = COSTS.get(A)(model, description), COSTS.get(W)(model, description)
    linears, matmul = 17 * 12 * 64 * 64, 17 * 17 * 64
    every = linears + 2 * matmul
    fc1, pv = (description.site(f"blocks.0.{name}") for name in ("mlp.fc1", "attn.pv"))
    assert cost.of(fc1, backends.formats(fc1.kind, 8, input_bits=3)) == pytest.approx(3 * 17 * 4 * 64 * 64 / every)
    assert cost.of(pv, backends.formats(pv.kind, 5)) == pytest.approx(5 * matmul / every)
    assert cost.of(description.site("head"), backends.formats(Kind.HEAD, 5)) == 0.0
    bits = {Kind.QKV: 2, Kind.PROJ: 3, Kind.FC1: 6, Kind.FC2: 7}
    chosen = [(s, backends.formats(s.kind, bits[s.kind])) for s in description.sites if s.kind in bits]
    mean = sum(cost.of(s, f) for s, f in chosen) * every / linears
    assert mean == pytest.approx(sum(weights.of(s, f) for s, f in chosen))


@pytest.mark.parametrize(
    "budget", [Budget(mean_bits=3, mean_activation_bits=4.2), Budget(bops="1.8%"), Budget(bops="2.2%", mean_bits=3.5)]
)
def test_free_widths_are_the_best_of_all(calibration: Calibration, budget: Budget) -> None:
    """Two linears and a matmul free, and bit operations, which are products of two widths."""
    problems, chosen = calibration.problems, free(calibration.description.sites)
    chosen = tuple(v for v in chosen if v.site.kind in (Kind.QKV, Kind.FC1, Kind.QK))
    given = narrowed(problems.problem(chosen, problems.limits(budget), 4, sloped(chosen)), (2, 4, 8))
    names = list(given.penalties)
    plans = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 4, 8), repeat=len(names))]
    found = ALLOCATORS.get("milp")(given)
    assert given.fits(found.bits) and any(not given.fits(bits) for bits in plans)
    assert found.objective == pytest.approx(min(given.penalty(bits) for bits in plans if given.fits(bits)), rel=1e-6)


@pytest.mark.parametrize("units", [{"bops": "1%"}, {"weight_bytes": "20%"}, {W: 4, A: 5}, {"latency_ms": "1000@8"}])
def test_a_problem_costs_what_its_plan_does(calibration: Calibration, units: dict[str, object]) -> None:
    """Whatever the widths: of `bops` neither operand's part is the cost of the site."""
    problems, chosen = calibration.problems, free(calibration.description.sites)
    limits = problems.limits(Budget(**units))
    given = problems.problem(chosen, limits, 4, None)
    source = torch.Generator().manual_seed(3)
    for _ in range(8):
        bits = {v.name: int(torch.randint(2, 9, (), generator=source)) for v in chosen}
        formats = problems.formats(chosen, bits, 4)
        sites = {s.name: SiteParams(s.kind, formats[s.name], {}, s.params) for s in calibration.description.sites}
        for unit in limits:
            assert given.cost(unit, bits) == pytest.approx(total(problems.cost(unit), calibration.description, sites))


def test_ties_give_the_tied_answer(calibration: Calibration) -> None:
    """Every width of a weight tied to its input, attention at the nominal width: LampQ's choice."""
    problems, sites = calibration.problems, calibration.description.sites
    linears, variables = tied(sites), tuple(v for v in free(sites) if not v.site.is_matmul)
    limits = problems.limits(Budget(mean_bits=4.3, bops="1.6%"))
    apart = sloped(variables)
    together = {v.name: {w: sum(apart[f"{v.name}.{o}"][w] for o in v.operands) for w in range(2, 9)} for v in linears}
    wanted = ALLOCATORS.get("milp")(problems.problem(linears, limits, 4, together))
    ties = {tuple(f"{v.name}.{operand}" for operand in v.operands): tuple(range(2, 9)) for v in linears}
    given = replace(problems.problem(variables, limits, 4, apart), ties=ties)
    found = ALLOCATORS.get("milp")(given)
    assert found.bits == {f"{name}.{o}": w for name, w in wanted.bits.items() for o in ("weight", "input")}
    assert found.objective == pytest.approx(wanted.objective)
    loose = ALLOCATORS.get("milp")(replace(given, ties={}))
    assert loose.objective < found.objective and not given.fits(loose.bits)


def test_what_time_allows_is_in_floating_point_with_both_operands(calibration: Calibration) -> None:
    problems, chosen = calibration.problems, free(calibration.description.sites)
    w8a8 = calibration.timed["latency_ms@8"].constant
    for share, all_float in ((1e3, True), (1.5, False)):
        limits = problems.limits(Budget(latency_ms=f"{share * w8a8}@8"))
        given = problems.problem(chosen, limits, 8, sloped(chosen))
        bits = ALLOCATORS.get("milp")(given).bits
        floats = {v.name for v in chosen if bits[v.name] == 16}
        assert given.fits(bits) and floats and all(name.endswith((".weight", ".input")) for name in floats)
        assert all(
            f"{name.rsplit('.', 1)[0]}.{operand}" in floats for name in floats for operand in ("weight", "input")
        )
        assert (len(floats) == 8) == all_float
        backends.check_formats(
            calibration.description.site("blocks.0.mlp.fc1"), problems.formats(chosen, bits, 8)["blocks.0.mlp.fc1"]
        )


def test_operands_alone_and_together(calibration: Calibration) -> None:
    """A penalty of a weight alone or an input alone is of that operand's error; both differ, and neither is the sum."""
    evidence = calibration.evidence("output-error", 4, free=True)
    score = PENALTIES.get("fisher-output")(evidence)
    both = PENALTIES.get("fisher-output")(calibration.evidence("output-error", 4))
    assert list(score.penalties) == [v.name for v in evidence.variables]
    for v in evidence.variables:
        row = score.penalties[v.name]
        assert list(row) == list(range(2, 9)) and 0 < row[8] < row[5] < row[2], v.name
    name = "blocks.0.mlp.fc1"
    seen, weight, params = evidence.fisher[name], evidence.weights[name], evidence.table[name][3]
    error = output(
        seen.rows, weight, params, Variable(f"{name}.weight", calibration.description.site(name), ("weight",))
    )
    wanted = 0.5 * float((seen.weights * (error - seen.rows @ weight.t()).square()).sum())
    assert score.penalties[f"{name}.weight"][3] == pytest.approx(wanted)
    apart = score.penalties[f"{name}.weight"][3] + score.penalties[f"{name}.input"][3]
    assert apart == pytest.approx(both.penalties[name][3], rel=0.5)


def test_errors_of_attention_foretell_its_divergence(calibration: Calibration) -> None:
    """At 4 bits, one matmul alone: the second-order prediction against the KL of the whole model."""
    m, evidence = calibration.measurements, calibration.evidence("output-error", 4, free=True)
    m.simulation.reset()
    with torch.no_grad():
        wanted = m.simulation(m.images).log_softmax(-1)
        for name in ("blocks.0.attn.qk", "blocks.0.attn.pv"):
            m.simulation.set({name: evidence.table[name][4]})
            found = m.simulation(m.images).log_softmax(-1)
            m.simulation.reset()
            kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
            assert 0.3 * kl < evidence.attention[name][4] < 3 * kl, name


def test_attention_is_judged_past_the_quantised_model_around_it(calibration: Calibration) -> None:
    """In context the simulation keeps what it is set to, and no hook stays but those that were there."""
    m, evidence = calibration.measurements, calibration.evidence("output-error", 4, free=True)
    hooks = [dict(module._forward_hooks) for module in m.simulation.modules()]
    found = evidence.attention_context
    assert set(found) == {"blocks.0.attn.qk", "blocks.0.attn.pv"} and found != evidence.attention
    assert all(m.simulation.module(s.name).params is None for s in m.description.sites)
    assert [dict(module._forward_hooks) for module in m.simulation.modules()] == hooks
    assert attention.errors(m.simulation, m.images, evidence._matmuls(), seed=0) == evidence.attention


def test_a_replay_answers_as_the_whole_model(images: Tensor) -> None:
    model = tiny_vit(depth=3, reg_tokens=2)
    simulation = Simulation(model)
    with torch.no_grad():
        replay, plain = Replay(simulation, images), simulation(images)
        for block in (None, 0, 1, 2):
            torch.testing.assert_close(replay(block), plain)
        last = simulation.module("blocks.2.mlp.fc1")
        last.original.weight.mul_(1.5)
        torch.testing.assert_close(replay(2), simulation(images))
        assert not torch.allclose(replay(2), plain)
    assert not any("forward" in block.__dict__ for block in simulation.model.blocks)


def test_a_measurement_is_believed_as_far_as_it_stands_out_of_its_noise() -> None:
    curves = {name: {2: 4.5, 4: 1.0, 5: 0.5} for name in "abcd"}
    exact = {"a": {2: 5.0, 5: 1.0}, "b": {2: 9.0, 5: 1.0}, "c": {2: 5.0, 5: 1.0}, "d": {2: 0.9, 5: 1.0}}
    middle = (4 + 8 + 4 - 0.1) / 16
    found = corrections(curves, exact)
    assert found == pytest.approx({"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.1 * middle})
    shifts = {"a": 20, "b": -20, "c": 20, "d": -20}
    noisy = {name: {width: d + shifts[name] for width, d in row.items()} for name, row in exact.items()}
    pulled = corrections(curves, noisy)
    assert all(abs(f - middle) < 0.1 * abs(found[name] - middle) + 1e-9 for name, f in pulled.items())
    assert corrections(curves, {name: {2: 1.0, 5: 2.0} for name in "abcd"}) == dict.fromkeys("abcd", 1.0)
    uneven = {"a": {2: 20.0, 5: 0.0}, "b": {2: 0.02, 5: 0.0}}
    half = corrections(uneven, {"a": {2: 40.0, 5: 0.0}, "b": {2: 1.0, 5: 0.5}})
    assert half["b"] == pytest.approx(
        half["a"], rel=0.2
    )  # 0.5 of noise says next to nothing of 0.02, not 25 times as much


@pytest.fixture(scope="module")
def planned(calibration: Calibration) -> object:
    name = "lampq+f, measured"
    if name not in RECIPES:
        both = ("fisher-output", "measured")
        RECIPES.register(name)(replace(RECIPES.get("lampq+f"), name=name, free=both))
    return calibration.plan(Budget(mean_bits=4), name)


def test_a_free_plan_keeps_both_means_and_says_so(planned: object) -> None:
    facts = planned.provenance
    assert planned.mean_bits <= 4 + 1e-9 and facts["costs"][A] <= 4 + 1e-9
    assert facts["budget"][A] == {"asked": None, "limit": 4.0, "reached": facts["costs"][A]}
    assert facts["budget"][W]["asked"] == 4.0 and facts["recipe"]["free"] == ["fisher-output", "measured"]
    kinds = [(p["penalty"], p.get("widths")) for p in facts["proposals"]]
    assert kinds == [("fisher-output", "free"), ("measured", "free"), ("fisher-output", None), (None, None)]


def test_activations_may_have_a_budget_of_their_own(calibration: Calibration) -> None:
    plan = calibration.plan(Budget.parse("mean_bits=3", "mean_activation_bits=5"), "lampq+f")
    assert plan.mean_bits <= 3 + 1e-9 and 4 < plan.provenance["costs"][A] <= 5 + 1e-9
    tied_plan = calibration.plan(Budget(mean_activation_bits=5), "lampq")
    assert tied_plan.provenance["costs"][A] <= 5 + 1e-9
    with pytest.raises(BudgetError, match="mean_activation_bits = 1 cannot be met; the smallest possible here is 2$"):
        calibration.plan(Budget(mean_bits=4, mean_activation_bits=1), "lampq+f")


@pytest.mark.parametrize("widths", [(5, 8, 7, 6, 8, 4, 6, 7, 4, 5), (8, 6, 8, 5, 6, 7, 1, 4, 7, 2)])
def test_unequal_widths_run_alike_everywhere(
    model: nn.Module, images: Tensor, calibration: Calibration, widths: tuple[int, ...], tmp_path: Path
) -> None:
    """Every operand at a width of its own, one weight of 1 bit among them, steps as the calibrator finds them."""
    m, chosen = calibration._for(RECIPES.get("lampq+f").preparation).measurements, free(calibration.description.sites)
    prepared = calibration._for(RECIPES.get("lampq+f").preparation)
    bits = dict(zip((v.name for v in chosen), widths, strict=True))
    formats = prepared.problems.formats(chosen, bits, 6)
    plan = calibration.plan(Budget(mean_bits=6), "fast")
    sites, edits, _ = finished(m, model, prepared.ready, [prepared._bare(formats)], RECIPES.get("lampq+f"))
    mixed = replace(plan, sites=sites, edits=edits)
    reached = {n: tuple(f.bits for f in p.formats.values()) for n, p in mixed.sites.items()}
    assert reached["blocks.0.attn.qkv"] == widths[:2] and reached["blocks.0.attn.qk"] == widths[2:3] * 2
    assert reached["blocks.0.mlp.fc1"] == widths[6:8]
    assert_paths_agree(model, mixed, images, noise_below=1.0)
    path = tmp_path / "mixed.plan"
    mixed.save(path)
    assert Plan.load(path).digest == mixed.digest
    checkpoint = tmp_path / "mixed.lampq"
    compiled = lampq_rt.compile(model, mixed)
    compiled.save(checkpoint)
    with torch.inference_mode():
        assert torch.equal(lampq_rt.load(checkpoint)(images), compiled(images))


def test_few_bits_on_average_take_single_ones(calibration: Calibration) -> None:
    """Weights may have 1 bit where they have levels, never an input; the tied choice keeps its widths."""
    problems = calibration._for(RECIPES.get("lampq+f").preparation).problems
    sites = calibration.description.sites
    limits = problems.limits(Budget(mean_bits=1.5, mean_activation_bits=4))
    found = ALLOCATORS.get("milp")(problems.problem(free(sites), limits, 2, None)).bits
    assert min(w for name, w in found.items() if name.endswith(".weight")) == 1
    assert min(w for name, w in found.items() if not name.endswith(".weight")) >= 2
    with pytest.raises(BudgetError, match="mean_bits = 1.5 cannot be met; the smallest possible here is 2$"):
        ALLOCATORS.get("milp")(problems.problem(tied(sites), problems.limits(Budget(mean_bits=1.5)), 2, None))


@pytest.mark.parametrize("scheme", ["uniform", "table"])
def test_one_bit_is_for_levels_of_weights_alone(scheme: str) -> None:
    assert backends.formats(Kind.FC1, 1, weight_scheme="levels")["input"].bits == 2
    with pytest.raises(FormatError, match="1 bit.* with scheme"):
        Format(1, scheme, "tensor", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"free": ("trace-dw",)}, "free widths by .'trace-dw'.; allowed: fisher-output, fisher-context, measured"),
        ({"refine": True}, "without the iterative update"),
        ({"preparation": Preparation(activations=8)}, "without a width of activations"),
        ({"preparation": Preparation(attention=8)}, "without a width of activations"),
    ],
)
def test_recipes_that_cannot_be_free_are_refused(change: dict[str, object], message: str) -> None:
    base: Recipe = RECIPES.get("lampq+f")
    with pytest.raises(ValueError, match=message):
        replace(base, **{"preparation": Preparation(), "compensate": False, **change})
