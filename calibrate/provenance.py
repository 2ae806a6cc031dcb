"""What a plan says of where it came from: plain JSON, no times and no paths, so that equal work gives equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lampq_rt.calibrate.costs import Budget, total
from lampq_rt.calibrate.proposal import Proposal
from lampq_rt.calibrate.recipes import Recipe
from lampq_rt.plan import SiteParams
from lampq_rt.version import __version__

if TYPE_CHECKING:
    from lampq_rt.calibrate.pipeline import Calibration


@dataclass(frozen=True)
class Facts:
    """What one plan was made with.

    Attributes:
        recipe: as carried out.
        budget: as asked.
        limits: by unit, in the cost's own unit; one that was not asked for comes from the recipe (`problems.implied`).
        nominal: width of the sites that the allocator does not decide on.
        proposals: all that were compared.
        proposal: the one that was kept.
        refined: summary of the iterative update, or None.
        edits: names of the parameters that the plan replaces.
    """

    recipe: Recipe
    budget: Budget
    limits: Mapping[str, float]
    nominal: int
    proposals: list[Proposal]
    proposal: Proposal
    refined: Mapping[str, Any] | None
    edits: tuple[str, ...]


def provenance(calibration: Calibration, facts: Facts, sites: Mapping[str, SiteParams]) -> dict[str, Any]:
    """The plan's provenance."""
    problems = calibration.problems
    costs = {
        unit: total(problems.cost(unit), calibration.description, sites) for unit in {**problems.costs, **facts.limits}
    }
    proposal, measurements = facts.proposal, calibration.measurements
    score, allocation = proposal.score, proposal.allocation
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": next(measurements.simulation.parameters()).device.type,
        "seed": measurements.seed,
        "target": calibration.target,
        "images": {
            "count": measurements.count,
            "sha256": calibration.images_digest,
            "labels": measurements.judge.labels is not None,
        },
        "recipe": facts.recipe.to_json(),
        "budget": {
            u: {"asked": facts.budget.limits.get(u), "limit": facts.limits[u], "reached": costs[u]}
            for u in facts.limits
        },
        "costs": {unit: costs[unit] for unit in problems.costs},
        "full_costs": {unit: cost.full for unit, cost in problems.costs.items()},
        "nominal_bits": facts.nominal,
        **calibration.timed.facts(facts.budget, costs),
        "objective": None if score is None else allocation.objective,
        "mip_gap": allocation.gap,
        "penalty": proposal.penalty,
        "proposals": [p.facts() for p in facts.proposals],
        "metric": {} if score is None else dict(score.facts),
        "sensitivity": {} if score is None else dict(score.sensitivity),
        "refine": None if facts.refined is None else dict(facts.refined),
        "residual_max": measurements.residual_max,
        "refused_rewrites": dict(calibration.ready.refused),
        "edits": len(facts.edits),
        "skipped": [{"name": s.name, "reason": s.reason} for s in calibration.description.skipped],
    }
