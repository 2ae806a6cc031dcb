"""Type awareness: what an amount of a metric means for accuracy in layers of each type (LampQ, AAAI-26, section 4.2).

alpha_t = A(t) / tr(F(t)): the mean accuracy drop over the mean metric of sampled layers of type t, each quantised
alone to beta bits, everything else in floating point. The paper does not print beta. Here it is the first of a few
widths, from wide to narrow, at which every type's mean drop lies between 5 and 60 points: below, 32 images resolve
nothing (one image is 3 points); above, the drop saturates. Where no width does that for every type, A(t) is the mean
rise in cross-entropy for all types alike, at the width that comes nearest: it resolves what accuracy does not, and a
drop of 0 points must not make a type free of charge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lampq_rt.calibrate.judge import Judge
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import Simulation
from lampq_rt.sites import Site

WIDTHS = (4, 3, 2)
WINDOW = (5.0, 60.0)
"""Points of accuracy between which a type's mean drop must lie to be used."""

FLOOR = 1e-3
"""The smallest A(t), as a share of the largest."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TypeDrops:
    """What quantising single layers does, by type.

    Attributes:
        bits: beta, the width that the layers had.
        unit: of `drops`: "accuracy points", "agreement points" or "cross-entropy".
        drops: A(t), positive, by type.
        layers: the sampled layers, by type.
    """

    bits: int
    unit: str
    drops: Mapping[str, float]
    layers: Mapping[str, Sequence[str]]

    def alpha(self, metric: Mapping[str, float]) -> dict[str, float]:
        """alpha_t = A(t) / mean over the sampled layers of `metric`, which is given by site; by type."""
        means = {t: sum(metric[name] for name in names) / len(names) for t, names in self.layers.items()}
        return {t: self.drops[t] / max(means[t], 1e-300) for t in self.layers}

    def facts(self, alpha: Mapping[str, float]) -> dict[str, Any]:
        """For the plan's provenance."""
        return {"beta": self.bits, "alpha": dict(alpha), **{k: v for k, v in asdict(self).items() if k != "bits"}}


def measure(
    simulation: Simulation,
    sites: Sequence[Site],
    table: Mapping[str, Mapping[int, SiteParams]],
    judge: Judge,
    *,
    layers: int = 3,
    widths: Sequence[int] = WIDTHS,
    seed: int = 0,
    progress: Progress | None = None,
) -> TypeDrops:
    """Quantise sampled layers one by one and see what becomes of the answers.

    Args:
        simulation: every site is returned to floating point before and after.
        sites: the blocks' linears.
        table: their formats and steps by width.
        judge: holds the images.
        layers: sampled layers a type (mu), all where there are fewer.
        widths: tried for beta, from wide to narrow.
        seed: of the sample.
        progress: called with the number of runs done and the largest number there can be.
    """
    names = _sample(sites, layers, seed)
    tried = [w for w in widths if all(w in table[n] for group in names.values() for n in group)]
    assert tried, f"no width of {widths} is in the table of every site"
    simulation.reset()
    whole = judge.judge(judge.logits)
    total, done = len(tried) * sum(map(len, names.values())), 0
    best: tuple[float, int, dict[str, float]] | None = None
    for width in tried:
        points, rises = {}, {}
        for kind, group in names.items():
            alone = []
            for name in group:
                simulation.set({name: table[name][width]})
                alone.append(judge(simulation))
                simulation.set({name: None})
                done += 1
                if progress is not None:
                    progress(done, total)
            points[kind] = sum(whole.accuracy - a.accuracy for a in alone) / len(alone)
            rises[kind] = sum(a.cross_entropy - whole.cross_entropy for a in alone) / len(alone)
        outside = sum(max(WINDOW[0] - p, p - WINDOW[1], 0.0) for p in points.values())
        if outside == 0.0:
            unit = "agreement points" if judge.labels is None else "accuracy points"
            return TypeDrops(width, unit, points, names)
        if best is None or outside < best[0]:
            best = (outside, width, rises)
    assert best is not None
    floor = FLOOR * max(max(best[2].values()), 1e-12)
    return TypeDrops(best[1], "cross-entropy", {kind: max(rise, floor) for kind, rise in best[2].items()}, names)


def _sample(sites: Sequence[Site], layers: int, seed: int) -> dict[str, list[str]]:
    """`layers` names a type, in order of execution."""
    generator = torch.Generator().manual_seed(seed)
    names: dict[str, list[str]] = {}
    for kind in dict.fromkeys(site.kind for site in sites):
        group = [site.name for site in sites if site.kind is kind]
        chosen = torch.randperm(len(group), generator=generator)[:layers].sort().values
        names[str(kind)] = [group[i] for i in chosen.tolist()]
    return names
