"""Which of several choices of bits is best once its errors are compensated: all are, and each is judged."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lampq_rt.calibrate.compensate import compensate
from lampq_rt.calibrate.distributed import SINGLE
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.judge import Judge
from lampq_rt.calibrate.spill import Shelf
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import Simulation

CLEARLY = 0.8
"""Steps by channel must bring the divergence on the calibration images below this share of that with one step: they fit
those images better than others. At 8 bits, in KL on 872 others: DeiT-Tiny 0.0127 with, 0.0049 without, where the
calibration images see no difference; ViT-Tiny 0.0124 with, 0.0164 without, where they see two thirds."""


def best_compensated(
    measurements: Measurements, model: nn.Module, candidates: Sequence[Mapping[str, SiteParams]], search: str
) -> tuple[dict[str, SiteParams], dict[str, Tensor], int]:
    """Sites, biases and number of the candidate that diverges least once it is compensated, with that range search.

    Where inputs of fc2 have steps by channel, one step is tried, too, and kept unless it is clearly worse. Options are
    dealt out to the processes; each is worked on with all images, so that the outcome is that of one process.
    """
    m, shard = measurements, measurements.shard
    options = [option for number, sites in enumerate(candidates) for option in _options(number, sites)]
    # What all processes measure together comes before each goes its own way. One option alone needs no judge.
    judge = replace(m.plan_judge, images=m.every_image, shard=SINGLE) if len(options) > 1 else None
    contest = _Contest(m, model, search, m.prefix_shares, judge)
    own = [(place, options[place]) for place in range(shard.rank, len(options), shard.world)]
    best = shard.together(lambda: contest.best(own))
    scores = shard.objects((best.divergence, best.place))
    winner = min(range(len(scores)), key=scores.__getitem__)
    found, biases = shard.objects(best.result() if shard.rank == winner else ({}, {}))[winner]
    chosen = options[scores[winner][1]].candidate
    return {name: found[name] for name in candidates[chosen]}, biases, chosen


class _Best:
    """The option that diverges least of those seen so far; its codes wait on disk."""

    def __init__(self) -> None:
        self.divergence, self.place = math.inf, sys.maxsize
        self._sites, self._names, self._biases = Shelf(), list[str](), dict[str, Tensor]()

    def see(self, divergence: float, place: int, found: Mapping[str, SiteParams], biases: dict[str, Tensor]) -> None:
        """Keep it if it is better, or the first."""
        if not self._names or divergence < self.divergence:
            self.divergence, self.place, self._names, self._biases = divergence, place, list(found), biases
            for name, params in found.items():
                self._sites.put(name, params)

    def result(self) -> tuple[dict[str, SiteParams], dict[str, Tensor]]:
        """Its sites, and its biases."""
        return {name: self._sites.get(name) for name in self._names}, self._biases


@dataclass(frozen=True)
class _Contest:
    """What options are compensated and compared with; `judge` sees all images."""

    measurements: Measurements
    model: nn.Module
    search: str
    prefix_shares: Mapping[str, float]
    judge: Judge | None

    def best(self, options: Sequence[tuple[int, _Option]]) -> _Best:
        """The best of these options, which come with their places among all."""
        m, best = self.measurements, _Best()
        device = next(m.simulation.parameters()).device
        for number, (place, option) in enumerate(options):

            def report(done: int, sites: int, before: int = number) -> None:
                m.report("compensating errors", before * sites + done, len(options) * sites)

            m.simulation.reset()
            quantised = Simulation(self.model).float().to(device)
            found, biases = compensate(
                m.simulation,
                quantised,
                m.every_image.to(device),
                option.sites,
                prefix_shares=self.prefix_shares,
                search=self.search,
                seed=m.seed,
                progress=report,
            )
            divergence = 0.0 if self.judge is None else self.judge(quantised).divergence * option.handicap
            best.see(divergence if math.isfinite(divergence) else math.inf, place, found, biases)
            del found, quantised
        return best


@dataclass(frozen=True)
class _Option:
    """A candidate, by number, with the formats to compensate it in, and what its divergence is multiplied with."""

    candidate: int
    sites: Mapping[str, SiteParams]
    handicap: float = 1.0


def _options(candidate: int, sites: Mapping[str, SiteParams]) -> list[_Option]:
    """With one step for the whole input everywhere, and as it is where that has steps by channel."""
    by_tensor = {name: _by_tensor(params) for name, params in sites.items()}
    by_channel = any(by_tensor[name] is not sites[name] for name in sites)
    return [_Option(candidate, by_tensor), *([_Option(candidate, sites, 1.0 / CLEARLY)] if by_channel else [])]


def _by_tensor(params: SiteParams) -> SiteParams:
    """The same formats with one step for the whole input; its steps are to be searched anew."""
    fmt = params.formats.get("input")
    if fmt is None or fmt.granularity != "channel":
        return params
    return replace(params, formats={**params.formats, "input": replace(fmt, granularity="tensor")}, tensors={})
