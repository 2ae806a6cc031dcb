"""From a model, images and a budget to a plan: measure, score, allocate, refine, write down.

    calibration = calibrate(model, images)                 # measures; nothing is measured twice
    plan = calibration.plan(Budget(mean_bits=4))           # any number of budgets and recipes
    plan = make_plan(model, images, budget=Budget(mean_bits=4))      # both in one

The allocator decides on the blocks' linears (LampQ, AAAI-26, section 4.1). Patch embedding (input at 8 bits), head
and attention matmuls take the nominal width: the budget's mean bits, rounded; without such a budget, the mean that
comes out, rounded. Under a budget of latency a linear may also stay in floating point: that costs time where integers
are faster, and then buys accuracy only where there is time to spare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lampq_rt.calibrate.allocate import ALLOCATORS, Problem
from lampq_rt.calibrate.costs import COSTS, Budget, Cost, edges_of
from lampq_rt.calibrate.costs.timed import TimedCosts
from lampq_rt.calibrate.distributed import SINGLE, Shard
from lampq_rt.calibrate.evidence import Measurements, SearchEvidence, check_images, resolve_device
from lampq_rt.calibrate.metrics import PENALTIES, Score
from lampq_rt.calibrate.prepare import NO_MORE, Material, finished, prepared
from lampq_rt.calibrate.progress import Report, reporting
from lampq_rt.calibrate.proposal import Proposal, finalists
from lampq_rt.calibrate.provenance import Facts, provenance
from lampq_rt.calibrate.recipes import PLAIN, RECIPES, Preparation, Recipe
from lampq_rt.calibrate.refine import refine
from lampq_rt.errors import BudgetError
from lampq_rt.formats import FLOAT_BITS, INTEGER_BITS
from lampq_rt.latency.table import LatencyTable
from lampq_rt.plan import Plan, SiteParams, weights_digest
from lampq_rt.sites import Site

Penalties = Mapping[str, Mapping[int, float]]


def make_plan(
    model: nn.Module,
    images: Tensor,
    *,
    budget: Budget,
    labels: Tensor | None = None,
    recipe: str = "lampq",
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
    RECIPES.get(recipe)  # before the minutes that measuring takes
    with reporting(progress) as report:
        calibration = Calibration(
            model,
            images,
            labels,
            target,
            seed,
            device,
            model_name=model_name,
            images_digest=images_digest,
            latency_table=latency_table,
            report=report,
            shard=shard,
            material=material,
        )
        return calibration.plan(budget, recipe)


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
    """A calibration that several plans can be asked of; arguments and errors as `make_plan`."""
    return Calibration(
        model,
        images,
        labels,
        target,
        seed,
        device,
        model_name=model_name,
        images_digest=images_digest,
        latency_table=latency_table,
        report=report,
        shard=shard,
        material=material,
    )


class Calibration:
    """One model with its calibration images. Made by `calibrate`; `plan` measures what is missing and keeps it."""

    @torch.inference_mode(False)  # the caller may be in it, and gradients are asked for all the same
    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        target: str,
        seed: int,
        device: str | torch.device | None,
        *,
        model_name: str | None,
        images_digest: str | None,
        latency_table: LatencyTable | Path | None = None,
        report: Report | None,
        shard: Shard = SINGLE,
        material: Material = NO_MORE,
        preparation: Preparation = PLAIN,
    ) -> None:
        self.original, self.material = model, material
        self.model, self.refused = prepared(model, images, preparation, seed)
        self.measurements = Measurements(
            self.model,
            images,
            labels,
            target=target,
            seed=seed,
            device=resolve_device(device),
            report=report or (lambda stage, done, total: None),
            shard=shard,
            preparation=preparation,
        )
        if material.images is not None:
            check_images(material.images, self.measurements.simulation)
        self._prepared: dict[Preparation, Calibration] = {preparation: self}
        self.description = self.measurements.description
        self.costs: dict[str, Cost] = {unit: COSTS.get(unit)(model, self.description) for unit in COSTS}
        self.timed = TimedCosts(model, self.measurements.images.shape[1:], target, latency_table)
        self.target = target
        self.model_name = model_name or self.description.architecture
        self.weights_digest = weights_digest(model)
        self.images_digest = images_digest or digest(self.measurements.images, shard)
        self._evidence: dict[tuple[str, int], SearchEvidence] = {}
        self._scores: dict[tuple[str, str, int], Score] = {}

    @torch.inference_mode(False)
    def plan(self, budget: Budget, recipe: str = "lampq") -> Plan:
        """The plan of that recipe under `budget`.

        Raises:
            BudgetError: no choice of bits keeps the budget.
            TableError: a budget of latency, and no table that has what it needs.
            UnknownNameError: unknown recipe.
        """
        chosen = RECIPES.get(recipe)
        return self._for(chosen.preparation)._plan(budget, chosen)

    def _for(self, preparation: Preparation) -> Calibration:
        """The calibration of the model as prepared in that way; what it measures is kept."""
        if preparation not in self._prepared:
            m = self.measurements
            self._prepared[preparation] = Calibration(
                self.original,
                m.images,
                m.labels,
                self.target,
                m.seed,
                next(m.simulation.parameters()).device,
                model_name=self.model_name,
                images_digest=self.images_digest,
                latency_table=self.timed.source,
                report=m.report,
                shard=m.shard,
                material=self.material,
                preparation=preparation,
            )
        return self._prepared[preparation]

    def _plan(self, budget: Budget, chosen: Recipe) -> Plan:
        limits = {unit: self._limit(budget, unit) for unit in budget}
        nominal = self._nominal_bits(chosen, limits)
        proposals = self._proposals(chosen, limits, nominal)
        proposal = self._best(chosen, proposals, nominal)
        bits, refined = dict(proposal.allocation.bits), None
        if chosen.refine and bits:
            bits, refined = self._refine(chosen, nominal, proposal)
        final, fixed = [proposal], self._fixed_widths(nominal)
        if chosen.compensate:
            final = finalists(proposals, proposal)
            candidates = [self._bare({**fixed, **found}) for found in (bits, *(p.allocation.bits for p in final[1:]))]
        else:
            candidates = [self._sites(chosen.search, bits, self._fixed(chosen.search, nominal))]
        sites, edits, kept = finished(self.measurements, self.original, self.model, candidates, chosen, self.material)
        proposal = final[kept]
        facts = Facts(chosen, budget, limits, nominal, proposals, proposal, refined, tuple(edits))
        dtype = self.measurements.residual_dtype
        return Plan(self.model_name, self.weights_digest, sites, provenance(self, facts, sites), dtype, edits)

    def evidence(self, search: str, nominal: int) -> SearchEvidence:
        """What penalties are made from, with the range search of that name and that nominal width."""
        key = (search, nominal)
        if key not in self._evidence:
            self._evidence[key] = SearchEvidence(self.measurements, search, nominal)
        return self._evidence[key]

    def _proposals(self, recipe: Recipe, limits: Mapping[str, float], nominal: int) -> list[Proposal]:
        """The allocator's answers to the recipe's penalties, and the same bits everywhere where it asks for that."""
        found = [self._propose(recipe, recipe.allocator, limits, nominal, p) for p in recipe.penalties or (None,)]
        if recipe.baseline:
            try:
                found.append(self._propose(recipe, "uniform", limits, nominal, None))
            except BudgetError:  # no common width keeps what a mixture keeps
                pass
        return found

    def _propose(
        self, recipe: Recipe, allocator: str, limits: Mapping[str, float], nominal: int, penalty: str | None
    ) -> Proposal:
        """The allocator's answer with that penalty; with None, or where there is nothing to choose, without."""
        score = None
        if penalty is not None and self.measurements.linears:
            key = (recipe.search, penalty, nominal)
            if key not in self._scores:
                self._scores[key] = PENALTIES.get(penalty)(self.evidence(recipe.search, nominal))
            score = self._scores[key]
        problem = self._problem(limits, nominal, None if score is None else score.penalties)
        return Proposal(penalty, score, problem, ALLOCATORS.get(allocator)(problem))

    def _best(self, recipe: Recipe, proposals: list[Proposal], nominal: int) -> Proposal:
        """The proposal of least divergence on the calibration images; one alone needs no trial."""
        if len({tuple(p.allocation.bits.values()) for p in proposals}) > 1:
            m, fixed = self.measurements, self._fixed(recipe.search, nominal)
            judge = m.plan_judge
            for done, proposal in enumerate(proposals, 1):
                m.simulation.set(self._sites(recipe.search, proposal.allocation.bits, fixed))
                proposal.divergence = judge(m.simulation).divergence
                m.simulation.reset()
                m.report("comparing plans", done, len(proposals))
        return min(proposals, key=lambda p: p.divergence or 0.0)

    def _bare(self, widths: Mapping[str, int]) -> dict[str, SiteParams]:
        """Formats alone of all sites: their steps are searched anew."""
        return {site.name: self.measurements.bare(site, widths[site.name]) for site in self.description.sites}

    def _sites(self, search: str, bits: Mapping[str, int], fixed: Mapping[str, SiteParams]) -> dict[str, SiteParams]:
        """Formats and steps of all sites, in order of execution."""
        table = self.measurements.params(search, {name: [width] for name, width in bits.items()})
        decided = {name: table[name][width] for name, width in bits.items()}
        return {site.name: {**fixed, **decided}[site.name] for site in self.description.sites}

    def _problem(self, limits: Mapping[str, float], nominal: int, penalties: Penalties | None) -> Problem:
        """The choice of widths with the other sites at the nominal width; by default, penalties know no data."""
        linears, menu = self.measurements.linears, self.measurements.menu
        widths = {site.name: self._widths(site, limits) for site in linears}
        if penalties is None:
            penalties = {site.name: {w: site.params * 4.0**-w for w in widths[site.name]} for site in linears}
        penalties = {name: {w: penalties[name].get(w, 0.0) for w in row} for name, row in widths.items()}
        costs, constants = {}, {}
        for unit in limits:
            cost = self.cost(unit)
            costs[unit] = {s.name: {w: cost.of(s, menu[s.name][w]) for w in widths[s.name]} for s in linears}
            others = (site for site in self.description.sites if site not in linears)
            constants[unit] = cost.constant + sum(
                cost.of(site, menu[site.name][self.measurements.nearest(site, nominal)]) for site in others
            )
        edges = {unit: found for unit in limits if (found := edges_of(self.cost(unit)))}
        return Problem(penalties, costs, limits, constants, edges, self.timed.inverse(limits))

    def cost(self, unit: str) -> Cost:
        """What that unit of a budget costs."""
        return self.timed[unit] if TimedCosts.has(unit) else self.costs[unit]

    def _limit(self, budget: Budget, unit: str) -> float:
        """The limit in the cost's own unit."""
        return self.timed.limit(budget, unit) if TimedCosts.has(unit) else budget.resolve(unit, self.costs[unit].full)

    def _widths(self, site: Site, limits: Mapping[str, float]) -> list[int]:
        """Widths that the site may have, narrowest first; floating point is one of them where time is limited."""
        return self.measurements.widths(site) + ([FLOAT_BITS] if any(map(TimedCosts.has, limits)) else [])

    def _nominal_bits(self, recipe: Recipe, limits: Mapping[str, float]) -> int:
        """A budget of mean bits, rounded; without one, the widest width that does not exceed the mean that it leaves.

        Nothing is measured for it, so that a budget that cannot be met says so at once.

        Raises:
            BudgetError: no choice of bits keeps the limits.
        """
        allocator = ALLOCATORS.get(recipe.allocator)
        if "mean_bits" in limits:
            nominal = _rounded(limits["mean_bits"])
            allocator(self._problem(limits, nominal, None))
            return nominal
        for nominal in reversed(INTEGER_BITS[1:]):
            try:
                bits = allocator(self._problem(limits, nominal, None)).bits
            except BudgetError:
                continue
            if not bits or _rounded(self._mean_bits(bits)) >= nominal:
                return nominal
        allocator(self._problem(limits, INTEGER_BITS[0], None))
        return INTEGER_BITS[0]

    def _mean_bits(self, bits: Mapping[str, int]) -> float:
        linears = self.measurements.linears
        return sum(s.params * bits[s.name] for s in linears) / sum(s.params for s in linears)

    def _fixed_widths(self, nominal: int) -> dict[str, int]:
        """Widths of the sites that the allocator does not decide on."""
        others = [site for site in self.description.sites if site not in self.measurements.linears]
        return {site.name: self.measurements.nearest(site, nominal) for site in others}

    def _fixed(self, search: str, nominal: int) -> dict[str, SiteParams]:
        """Sites that the allocator does not decide on, at the nominal width."""
        widths = self._fixed_widths(nominal)
        found = self.measurements.params(search, {name: [width] for name, width in widths.items()})
        return {name: found[name][width] for name, width in widths.items()}

    def _refine(self, recipe: Recipe, nominal: int, proposal: Proposal) -> tuple[dict[str, int], Mapping[str, Any]]:
        m, evidence = self.measurements, self.evidence(recipe.search, nominal)
        table, errors = evidence.table, evidence.errors  # measured before the simulation is set
        if FLOAT_BITS in next(iter(proposal.problem.penalties.values())):
            floating = m.params(recipe.search, {name: [FLOAT_BITS] for name in table})
            table = {name: {**row, **floating[name]} for name, row in table.items()}
            errors = {name: {**row, FLOAT_BITS: 0.0} for name, row in errors.items()}
        fixed = self._fixed(recipe.search, nominal)
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


def _rounded(mean_bits: float) -> int:
    """`mean_bits` rounded, within the integer widths."""
    return min(max(round(mean_bits), INTEGER_BITS[0]), INTEGER_BITS[-1])
