"""From images to a plan on a tiny random ViT: what is refused, what is recorded, and equal plans for equal work."""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lampq_rt import Plan, quickstart
from lampq_rt.calibrate import RECIPES, Budget, Calibration, calibrate, make_plan
from lampq_rt.calibrate.judge import Judge
from lampq_rt.calibrate.metrics import PENALTIES
from lampq_rt.calibrate.metrics.alpha import FLOOR, TypeDrops, measure
from lampq_rt.calibrate.metrics.context import straight_through
from lampq_rt.calibrate.recipes import DEFAULT_RECIPE
from lampq_rt.cli_make import calibrate as command
from lampq_rt.compiler import check_plan
from lampq_rt.errors import BackendError, BudgetError, DataError, ModelError, UnknownNameError
from lampq_rt.simulate import Simulation, simulate
from lampq_rt.sites import BLOCK_LINEARS, MATMULS, Kind

IMAGES = 8


def build(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = VisionTransformer(**{**sizes, **kwargs}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return build()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(model: VisionTransformer, images: Tensor) -> Calibration:
    return calibrate(model, images)


def same(a: Plan, b: Plan) -> bool:
    if (a.model, a.weights_digest, a.residual_dtype, list(a.sites)) != (
        b.model,
        b.weights_digest,
        b.residual_dtype,
        list(b.sites),
    ):
        return False
    if json.dumps(a.provenance) != json.dumps(b.provenance):
        return False
    for name, site in a.sites.items():
        other = b.sites[name]
        if (site.formats, site.params, list(site.tensors)) != (other.formats, other.params, list(other.tensors)):
            return False
        if not all(torch.equal(t, other.tensors[key]) for key, t in site.tensors.items()):
            return False
    return True


@pytest.mark.usefixtures("short_trainings")
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_gives_a_plan_that_fits_model_and_budget(
    calibration: Calibration, model: VisionTransformer, images: Tensor, recipe: str
) -> None:
    plan = calibration.plan(Budget(mean_bits=4), recipe)
    check_plan(model, plan)
    assert plan.mean_bits <= 4.0 + 1e-9
    assert plan.provenance["costs"]["mean_bits"] == pytest.approx(plan.mean_bits)
    matmuls, free = RECIPES.get(recipe).preparation.attention or 4, bool(RECIPES.get(recipe).free)
    for site in plan.sites.values():
        if site.kind not in BLOCK_LINEARS and not (free and site.kind in MATMULS):
            assert site.bits == (matmuls if site.kind in MATMULS else 4)
    assert plan.sites["patch_embed.proj"].formats["input"].bits == 8
    assert simulate(model, plan)(images).shape == (IMAGES, 10)
    facts = json.loads(json.dumps(plan.provenance, allow_nan=False))
    assert facts["recipe"]["name"] == recipe and facts["images"]["count"] == IMAGES
    assert facts["budget"]["mean_bits"] == {"asked": 4.0, "limit": 4.0, "reached": facts["costs"]["mean_bits"]}
    assert set(facts["costs"]) == {"bops", "mean_activation_bits", "mean_bits", "weight_bytes"}
    linears = [name for name, site in plan.sites.items() if site.kind in BLOCK_LINEARS]
    assert list(facts["sensitivity"]) == ([] if facts["penalty"] is None else linears)
    assert facts["penalty"] is None or RECIPES.get(recipe).allocator == "milp"


def test_the_same_seed_gives_the_same_plan_and_the_model_is_left_alone(
    calibration: Calibration, model: VisionTransformer, images: Tensor
) -> None:
    state, training = copy.deepcopy(model.state_dict()), model.training
    once, again = (make_plan(model, images, budget=Budget(mean_bits=3.5), recipe="lampq") for _ in range(2))
    assert same(once, again)
    assert same(once, calibration.plan(Budget(mean_bits=3.5), "lampq"))  # whatever was planned with it before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training == training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not same(once, make_plan(model, images, budget=Budget(mean_bits=3.5), recipe="lampq", seed=1))


def test_several_budgets_hold_at_once(calibration: Calibration) -> None:
    free = calibration.plan(Budget(mean_bits=5.5), "lampq").provenance["costs"]
    limits = {"mean_bits": 5.5, "weight_bytes": 0.97 * free["weight_bytes"], "bops": 0.95 * free["bops"]}
    plan = calibration.plan(Budget(**limits), "lampq")
    assert all(plan.provenance["costs"][unit] <= limit for unit, limit in limits.items())
    assert plan.mean_bits > 4.5 and plan.provenance["nominal_bits"] == 6


@pytest.mark.parametrize("recipe", ["uniform", "lampq"])
@pytest.mark.parametrize("budget", ["weight_bytes=20%", "weight_bytes=30%", "bops=2%"])
def test_without_mean_bits_the_other_sites_follow_the_mean(calibration: Calibration, recipe: str, budget: str) -> None:
    plan = calibration.plan(Budget.parse(budget), recipe)
    nominal = plan.provenance["nominal_bits"]
    assert {s.bits for s in plan.sites.values() if s.kind not in BLOCK_LINEARS} == {nominal}
    assert abs(nominal - plan.mean_bits) <= 1.5
    ((_, reached),) = plan.provenance["budget"].items()
    assert reached["reached"] <= reached["limit"]


def test_budgets_out_of_reach_say_what_is_possible(model: VisionTransformer, images: Tensor) -> None:
    for recipe in ("uniform", "lampq"):
        with pytest.raises(BudgetError, match=r"mean_bits = 0\.5 cannot be met; the smallest possible here is 2$"):
            make_plan(model, images, budget=Budget(mean_bits=0.5), recipe=recipe)
        with pytest.raises(BudgetError, match="weight_bytes = .* cannot be met"):
            make_plan(model, images, budget=Budget(weight_bytes="1%"), recipe=recipe)


@pytest.mark.parametrize("limit", [5, "15%"])
def test_fixed_activations_and_a_limit_below_them_are_refused_before_the_model_is_looked_at(limit: str | int) -> None:
    with pytest.raises(BudgetError, match="cannot be met by recipe lampq.w, whose activations have 8 bits; .* lampq.f"):
        make_plan(torch.nn.Identity(), torch.zeros(1), budget=Budget(mean_bits=4, mean_activation_bits=limit))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], r"expected a floating-point tensor \[n, channels"),
        (lambda x: x[0], r"expected a floating-point tensor"),
        (lambda x: x.to(torch.uint8), r"uint8"),
        (lambda x: x.numpy(), r"ndarray"),
        (lambda x: torch.where(torch.arange(IMAGES)[:, None, None, None] == 5, torch.nan, x), r"image number 5 is not"),
        (lambda x: x[:, :1], r"does not take images of shape \(1, 32, 32\)"),
        (lambda x: x[..., :16], r"does not take images of shape \(3, 32, 16\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    model: VisionTransformer, images: Tensor, change: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        calibrate(model, change(images))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "8 whole numbers"),
        (torch.zeros(IMAGES), "8 whole numbers"),
        (torch.full((IMAGES,), 10), r"classes 0\.\.9"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    model: VisionTransformer, images: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(model, images, labels=labels)


def test_unknown_names_and_devices_are_refused(model: VisionTransformer, images: Tensor) -> None:
    with pytest.raises(
        UnknownNameError,
        match=re.escape(f"unknown recipe 'best'; known: {', '.join(sorted(RECIPES))}"),
    ):
        make_plan(model, images, budget=Budget(mean_bits=4), recipe="best")
    with pytest.raises(BackendError, match="target"):
        calibrate(model, images, target="tpu")
    with pytest.raises(BackendError, match="allowed: cpu, cuda"):
        calibrate(model, images, device="toaster")
    with pytest.raises(ModelError):
        calibrate(torch.nn.Linear(3, 3), images)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"qk_norm": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"num_classes": 0},
        {"reg_tokens": 2, "patch_size": 16},
    ],
)
def test_variants_of_the_architecture(kwargs: dict[str, Any], images: Tensor) -> None:
    model = build(depth=1, **kwargs)
    plan = make_plan(model, images[:4], budget=Budget(mean_bits=4))
    assert plan.provenance["recipe"]["name"] == DEFAULT_RECIPE
    check_plan(model, plan)


@pytest.mark.parametrize(("recipe", "same_as"), [(DEFAULT_RECIPE, "fast"), ("lampq", "uniform")])
def test_nothing_is_measured_for_a_choice_that_a_budget_does_not_limit(
    images: Tensor, recipe: str, same_as: str
) -> None:
    model, stages, budget = build(depth=1), set[str](), Budget(mean_bits=8)
    plan = make_plan(model, images, budget=budget, recipe=recipe, progress=lambda stage, *_: stages.add(stage))
    assert {site.bits for site in plan.sites.values()} == {8}
    assert stages.isdisjoint({"Fisher information", "iterative update"})
    assert plan.digest == make_plan(model, images, budget=budget, recipe=same_as).digest


def test_commands_and_functions_have_the_same_default_recipe() -> None:
    defaults = [inspect.signature(f).parameters["recipe"].default for f in (make_plan, Calibration.plan, command)]
    assert [*defaults, quickstart.OURS] == [DEFAULT_RECIPE] * 4


def test_labels_names_and_progress_are_used(model: VisionTransformer, images: Tensor) -> None:
    stages: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        stages[stage] = (done, total)

    plan = make_plan(
        model,
        images,
        budget=Budget(mean_bits=4),
        labels=torch.arange(IMAGES),
        recipe="lampq-paper",
        model_name="tiny",
        images_digest="abc",
        progress=report,
    )
    assert plan.model == "tiny"
    assert plan.provenance["images"] == {"count": IMAGES, "sha256": "abc", "labels": True}
    assert {"observing activations", "Fisher information", "accuracy by layer type", "iterative update"} <= set(stages)
    assert set(plan.provenance["metric"]["alpha"]) == {str(kind) for kind in BLOCK_LINEARS}
    assert all(value > 0 for value in plan.provenance["metric"]["alpha"].values())


def test_a_large_residual_stream_asks_for_bfloat16(images: Tensor) -> None:
    model = build(depth=1)
    assert calibrate(model, images).plan(Budget(mean_bits=8), "uniform").residual_dtype == "float16"
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[3] = 30000.0
    assert calibrate(model, images).plan(Budget(mean_bits=8), "uniform").residual_dtype == "bfloat16"


def test_penalties_fall_with_width(calibration: Calibration) -> None:
    evidence = calibration.evidence("output-error", 4)
    for name in PENALTIES:
        score = PENALTIES.get(name)(evidence)
        for site, row in score.penalties.items():
            assert list(row) == list(range(2, 9)), (name, site)
            assert 0 < row[8] < row[6] < row[4] < row[2], (name, site)
            assert score.sensitivity[site] > 0


def test_alone_measures_the_model_with_one_linear_quantised(calibration: Calibration) -> None:
    evidence, m = calibration.evidence("output-error", 4), calibration.measurements
    score, curves = PENALTIES.get("alone")(evidence), PENALTIES.get("fisher-output")(evidence).penalties
    for site in evidence.sites:
        m.simulation.reset()
        m.simulation.set({site.name: evidence.table[site.name][4]})
        wanted = m.judge(m.simulation).unshifted
        assert score.penalties[site.name][4] == pytest.approx(wanted, rel=1e-3)
        assert score.penalties[site.name][3] / score.penalties[site.name][4] == pytest.approx(
            curves[site.name][3] / curves[site.name][4]
        )
    m.simulation.reset()


def test_gradients_pass_straight_through_quantised_sites(model: VisionTransformer, images: Tensor) -> None:
    simulation = Simulation(model)
    plan = make_plan(model, images, budget=Budget(mean_bits=8), recipe="uniform")
    simulation.set(plan.sites)
    x = images.clone().requires_grad_(True)
    plain = simulation(images)
    with straight_through(simulation):
        logits = simulation(x)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(logits[:, 3].sum(), x)
    y = images.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(model(y)[:, 3].sum(), y)
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    assert all(not simulation.module(s.name)._forward_hooks for s in simulation.description.sites)


@pytest.mark.parametrize(("drop", "unit", "beta"), [(20.0, "accuracy points", 4), (0.0, "cross-entropy", 4)])
def test_alpha_falls_back_to_cross_entropy_where_accuracy_says_nothing(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch, drop: float, unit: str, beta: int
) -> None:
    evidence = calibration.evidence("output-error", 4)
    m = calibration.measurements
    judge = Judge(m.images, m.judge.logits, torch.zeros(IMAGES, dtype=torch.long), IMAGES)
    whole = judge.judge(judge.logits)

    def answer(self: Judge, simulation: Simulation, rival: object = None) -> object:
        active = [s.name for s in evidence.sites if simulation.module(s.name).params is not None]
        assert len(active) == 1
        rise = -0.5 if active[0].endswith("proj") else 0.25
        return type(whole)(whole.accuracy - drop, whole.cross_entropy + rise, 0.1, 0.1, 0.1)

    monkeypatch.setattr(Judge, "__call__", answer)
    found = measure(m.simulation, evidence.sites, evidence.table, judge, layers=2, seed=0)
    assert (found.unit, found.bits) == (unit, beta)
    assert set(map(len, found.layers.values())) == {2}
    alpha = found.alpha({site.name: 2.0 for site in evidence.sites})
    if drop:
        assert set(alpha.values()) == {drop / 2}
    else:
        assert alpha["qkv"] == 0.125 and alpha["proj"] == pytest.approx(0.25 * FLOOR / 2)


def test_alpha_is_the_ratio_of_the_means() -> None:
    drops = TypeDrops(3, "accuracy points", {"qkv": 12.0}, {"qkv": ["a", "b"]})
    assert drops.alpha({"a": 1.0, "b": 5.0, "c": 100.0}) == {"qkv": 4.0}


def test_a_model_whose_blocks_stay_in_floating_point(images: Tensor) -> None:
    """Only patch embedding and head are left: nothing for the allocator, still a plan."""
    model = build(depth=1)
    model.blocks[0].attn.norm = torch.nn.LayerNorm(64)
    model.blocks[0].mlp.norm = torch.nn.LayerNorm(256)
    plan = make_plan(model, images, budget=Budget(mean_bits=4))
    assert {site.kind for site in plan.sites.values()} == {Kind.PATCH_EMBED, Kind.HEAD}
    assert plan.provenance["skipped"] and plan.mean_bits == 0.0
