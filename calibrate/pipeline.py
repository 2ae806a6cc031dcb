"""From a model, images and a budget to a plan: measure, score, allocate, refine, write down.

    calibration = calibrate(model, images)                 # measures; nothing is measured twice
    plan = calibration.plan(Budget(mean_bits=4))           # any number of budgets and recipes
    plan = make_plan(model, images, budget=Budget(mean_bits=4))      # both in one

The allocator decides on the blocks' linears (LampQ, AAAI-26, section 4.1), or on weights, inputs and attention matmuls
one by one (`variables`). What is left, patch embedding (input at 8 bits), head and, in the first case, attention,
takes the nominal width: the budget's mean bits, rounded; without such a budget, the mean that comes out, rounded.
Under a budget of latency a linear may also stay in floating point: that costs time where integers are faster, and
then buys accuracy only where there is time to spare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate import variables
from lampq_rt.calibrate.allocate import ALLOCATORS
from lampq_rt.calibrate.checks import check_images, check_recipe, resolve_device
from lampq_rt.calibrate.costs import Budget
from lampq_rt.calibrate.costs.timed import TimedCosts
from lampq_rt.calibrate.distributed import SINGLE, Shard
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.metrics import PENALTIES, Score
from lampq_rt.calibrate.prepare import NO_MORE, Material, finished, prepared
from lampq_rt.calibrate.problems import Problems, implied
from lampq_rt.calibrate.progress import Report, reporting
from lampq_rt.calibrate.proposal import Proposal, distinct
from lampq_rt.calibrate.provenance import Facts, provenance
from lampq_rt.calibrate.recipes import DEFAULT_RECIPE, PLAIN, RECIPES, Preparation, Recipe
from lampq_rt.calibrate.refine import refine
from lampq_rt.calibrate.search_evidence import SearchEvidence
from lampq_rt.calibrate.setting import Setting, silent
from lampq_rt.calibrate.variables import Variable
from lampq_rt.edits import replaced_activations
from lampq_rt.errors import BudgetError
from lampq_rt.formats import FLOAT_BITS
from lampq_rt.latency.table import LatencyTable
from lampq_rt.plan import Plan, SiteParams, weights_digest


def make_plan(
    model: nn.Module,
    images: Tensor,
    *,
    budget: Budget,
    labels: Tensor | None = None,
    recipe: str = DEFAULT_RECIPE,
    target: str = "any",
    seed: int = 0,
    device: str | torch.device | None = None,
    model_name: str | None = None,
    images_digest: str | None = None,
    latency_table: LatencyTable | Path | None = None,
    progress: Report | bool | None = None,
    shard: Shard = SINGLE,
    material: Material = NO_MORE,
) -> Plan:
    """Choose bits and steps for every site of `model`.

    The same arguments, machine and number of threads give the same plan, byte for byte.

    Args:
        model: a timm Vision Transformer in floating point; it is copied, never changed.
        images: [n, C, H, W] floating point, normalised as for the model; 32 are enough.
        budget: upper limits, any number of units at once.
        labels: int64 [n] classes of the images; without, the model's own answers stand in for them.
        recipe: name in `RECIPES`.
        target: "any", "cpu" or "cuda": whose formats may be used.
        seed: of everything that is sampled.
        device: where to measure, "cpu" (default) or "cuda".
        model_name: what the plan calls the model; timm's name of it by default.
        images_digest: what the plan records of the images; the SHA-256 of their values by default.
        latency_table: what budgets of latency are reckoned with; by default the present machine's.
        progress: True for a bar, or a function called with stage, done and total.
        shard: the processes that calibrate together (`distributed.current`); images and labels are then this process's
            share of them (`Shard.share`). All processes get the same plan.
        material: what recipes that train (`lampq+rec`) have beside: more images, and a file to resume from.

    Raises:
        ModelError: the model is of no supported family.
        DataError: images or labels that do not fit the model or are not finite.
        BudgetError: no choice of bits keeps the budget.
        BackendError: unknown target or device.
        TableError: a budget of latency, and no table that has what it needs.
        UnknownNameError: unknown recipe.
    """
    check_recipe(RECIPES.get(recipe), budget, shard.world)  # before the minutes that measuring takes
    with reporting(progress) as report:
        setting = Setting(
            target=target, seed=seed, device=device, model_name=model_name, images_digest=images_digest,
            latency_table=latency_table, report=report, shard=shard, material=material,
        )  # fmt: skip
        return Calibration(model, images, labels, setting).plan(budget, recipe)


def calibrate(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    target: str = "any",
    seed: int = 0,
    device: str | torch.device | None = None,
    model_name: str | None = None,
    images_digest: str | None = None,
    latency_table: LatencyTable | Path | None = None,
    report: Report | None = None,
    shard: Shard = SINGLE,
    material: Material = NO_MORE,
) -> Calibration:
    """A calibration that several plans can be asked of; arguments and errors as `make_plan`.

    `report` is what `progress` is there, as a function alone.
    """
    setting = Setting(
        target=target, seed=seed, device=device, model_name=model_name, images_digest=images_digest,
        latency_table=latency_table, report=report or silent, shard=shard, material=material,
    )  # fmt: skip
    return Calibration(model, images, labels, setting)


class Calibration:
    """One model with its calibration images. Made by `calibrate`; `plan` measures what is missing and keeps it.

    Args:
        model: in floating point; not changed.
        images: [n, C, H, W] floating point, normalised as for the model.
        labels: int64 [n] or None.
        setting: where and with what.
        preparation: of the model, before anything is measured.
    """

    @torch.inference_mode(False)  # the caller may be in it, and gradients are asked for all the same
    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        setting: Setting,
        preparation: Preparation = PLAIN,
    ) -> None:
        self.original, material, shard = model, setting.material, setting.shard
        every = images if preparation == PLAIN else shard.gather(images)  # rewrites are those of one process
        self.ready = prepared(model, every, preparation, setting.seed, material.images, setting.report)
        self.measurements = Measurements(
            self.ready.model,
            images,
            labels,
            target=setting.target,
            seed=setting.seed,
            device=resolve_device(setting.device),
            report=setting.report,
            shard=shard,
            preparation=preparation,
            teacher=self.ready.teacher,
        )
        if material.images is not None:
            material = replace(material, images=check_images(material.images, self.measurements.simulation))
        self.material = material
        self._prepared: dict[Preparation, Calibration] = {preparation: self}
        self.description = self.measurements.description
        self.timed = TimedCosts(model, self.measurements.images.shape[1:], setting.target, setting.latency_table)
        self.problems = Problems(model, self.measurements, self.timed)
        self.target = setting.target
        self.model_name = setting.model_name or self.description.architecture
        self.weights_digest = weights_digest(model)
        self.images_digest = setting.images_digest or digest(self.measurements.images, shard)
        self._setting = replace(
            setting, model_name=self.model_name, images_digest=self.images_digest, material=self.material
        )
        self._evidence: dict[tuple[str, int, bool], SearchEvidence] = {}
        self._scores: dict[tuple[str, str, int, bool], Score] = {}

    @torch.inference_mode(False)
    def plan(self, budget: Budget, recipe: str = DEFAULT_RECIPE, resume: Path | None = None) -> Plan:
        """The plan of that recipe under `budget`; `resume` keeps the state of its training, in place of the material's.

        Raises:
            BudgetError: no choice of bits keeps the budget.
            DataError: the recipe needs all images in one process, and they are shared among several.
            TableError: a budget of latency, and no table that has what it needs.
            UnknownNameError: unknown recipe.
        """
        chosen = RECIPES.get(recipe)
        check_recipe(chosen, budget, self.measurements.shard.world)
        prepared = self._for(chosen.preparation)
        return prepared._plan(budget, chosen, replace(self.material, resume=resume or self.material.resume))

    def _for(self, preparation: Preparation) -> Calibration:
        """The calibration of the model as prepared in that way; what it measures is kept."""
        if preparation not in self._prepared:
            m, setting = self.measurements, replace(self._setting, latency_table=self.timed.source)
            self._prepared[preparation] = Calibration(self.original, m.images, m.labels, setting, preparation)
        return self._prepared[preparation]

    def _plan(self, budget: Budget, chosen: Recipe, material: Material) -> Plan:
        limits = self.problems.limits(implied(budget) if chosen.free else budget)
        nominal = self.problems.nominal_bits(chosen.allocator, self._variables(bool(chosen.free)), limits)
        settled = self._all_at_most(limits, nominal)  # then minutes of measuring could not find better
        if settled:
            proposals = [self._propose(chosen, "uniform", limits, nominal, None)]
        else:
            proposals = self._proposals(chosen, limits, nominal)
        proposal = self._best(chosen, proposals)
        formats, refined = proposal.formats, None
        if chosen.refine and proposal.allocation.bits and not settled:
            bits, refined = self._refine(chosen, nominal, proposal)
            formats = self.problems.formats(self._variables(False), bits, nominal)
        final = [proposal]
        if chosen.compensate:
            final = distinct(proposals, proposal)
            candidates = [self._bare(found) for found in (formats, *(p.formats for p in final[1:]))]
        else:
            candidates = [self.measurements.chosen(chosen.search, formats)]
        sites, edits, kept = finished(self.measurements, self.original, self.ready, candidates, chosen, material)
        proposal = final[kept]
        facts = Facts(chosen, budget, limits, nominal, proposals, proposal, refined, tuple(edits))
        dtype = self.measurements.residual_dtype
        return Plan(
            self.model_name,
            self.weights_digest,
            sites,
            provenance(self, facts, sites),
            dtype,
            edits,
            replaced_activations(self.original, self.ready.model),
        )

    def evidence(self, search: str, nominal: int, free: bool = False) -> SearchEvidence:
        """What penalties are made from, with the range search of that name, that nominal width, and those variables."""
        key = (search, nominal, free)
        if key not in self._evidence:
            shared = self.evidence(search, nominal) if free else None
            self._evidence[key] = SearchEvidence(self.measurements, search, nominal, self._variables(free), shared)
        return self._evidence[key]

    def _variables(self, free: bool) -> tuple[Variable, ...]:
        return variables.of(self.description, free_widths=free)

    def _proposals(self, recipe: Recipe, limits: Mapping[str, float], nominal: int) -> list[Proposal]:
        """The allocator's answers to the recipe's penalties, and the same bits everywhere where it asks for that."""
        found = [self._propose(recipe, recipe.allocator, limits, nominal, p, free=True) for p in recipe.free]
        tied = [(recipe.allocator, penalty) for penalty in recipe.penalties or (None,)]
        for allocator, penalty in tied + ([("uniform", None)] if recipe.baseline else []):
            try:
                found.append(self._propose(recipe, allocator, limits, nominal, penalty))
            except BudgetError:  # no common width keeps what a mixture keeps, no tied widths what free ones keep
                if not found:
                    raise
        return found

    def _all_at_most(self, limits: Mapping[str, float], nominal: int) -> bool:
        """True where the budgets allow every linear the most bits that there are, floating point not among them."""
        problem = self.problems.problem(self._variables(False), limits, nominal, None)
        most = {name: max(widths) for name, widths in problem.penalties.items()}
        return FLOAT_BITS not in most.values() and len(set(most.values())) == 1 and problem.fits(most)

    def _propose(
        self,
        recipe: Recipe,
        allocator: str,
        limits: Mapping[str, float],
        nominal: int,
        penalty: str | None,
        free: bool = False,
    ) -> Proposal:
        """The allocator's answer with that penalty; with None, or where there is nothing to choose, without."""
        score, chosen = None, self._variables(free)
        if penalty is not None and chosen:
            key = (recipe.search, penalty, nominal, free)
            if key not in self._scores:
                self._scores[key] = PENALTIES.get(penalty)(self.evidence(recipe.search, nominal, free))
            score = self._scores[key]
        problem = self.problems.problem(chosen, limits, nominal, None if score is None else score.penalties)
        allocation = ALLOCATORS.get(allocator)(problem)
        formats = self.problems.formats(chosen, allocation.bits, nominal)
        return Proposal(penalty, score, problem, allocation, formats, free)

    def _best(self, recipe: Recipe, proposals: list[Proposal]) -> Proposal:
        """The proposal of least divergence on the calibration images; one alone needs no trial."""
        if any(p.formats != proposals[0].formats for p in proposals):
            m = self.measurements
            judge = m.plan_judge
            for done, proposal in enumerate(proposals, 1):
                m.simulation.set(m.chosen(recipe.search, proposal.formats))
                proposal.divergence = judge(m.simulation).divergence
                m.simulation.reset()
                m.report("comparing plans", done, len(proposals))
        return min(proposals, key=lambda p: p.divergence or 0.0)

    def _bare(self, formats: Mapping[str, Formats]) -> dict[str, SiteParams]:
        """Formats alone of all sites: their steps are searched anew."""
        sites = self.description.sites
        return {site.name: SiteParams(site.kind, dict(formats[site.name]), {}, site.params) for site in sites}

    def _refine(self, recipe: Recipe, nominal: int, proposal: Proposal) -> tuple[dict[str, int], Mapping[str, Any]]:
        m, evidence = self.measurements, self.evidence(recipe.search, nominal)
        table, errors = evidence.table, evidence.errors  # measured before the simulation is set
        if FLOAT_BITS in next(iter(proposal.problem.penalties.values())):
            floating = m.params(recipe.search, {name: [FLOAT_BITS] for name in table})
            table = {name: {**row, **floating[name]} for name, row in table.items()}
            errors = {name: {**row, FLOAT_BITS: 0.0} for name, row in errors.items()}
        fixed = m.chosen(
            recipe.search, {n: f for n, f in proposal.formats.items() if n not in proposal.allocation.bits}
        )
        m.simulation.reset()
        m.simulation.set(fixed)
        try:
            result = refine(
                m.simulation,
                table,
                proposal.problem,
                errors,
                proposal.allocation.bits,
                m.plan_judge,
                progress=lambda done, total: m.report("iterative update", done, total),
            )
        finally:
            m.simulation.reset()
        return dict(result.bits), result.facts


def digest(images: Tensor, shard: Shard) -> str:
    """SHA-256 over the SHA-256 of every image's shape, dtype and bytes, in order, hexadecimal."""
    own = []
    for image in images.detach().cpu():
        found = hashlib.sha256(f"{image.dtype}|{tuple(image.shape)}|".encode())
        found.update(image.contiguous().flatten().view(torch.uint8).numpy().data)
        own.append(found.hexdigest())
    return hashlib.sha256("".join(text for part in shard.objects(own) for text in part).encode()).hexdigest()
