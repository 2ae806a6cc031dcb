"""What one variable alone does to the answers when it gets fewer or more bits, measured around the nominal model.

The nominal model is the one that a compensating recipe ends with at the same bits everywhere: its steps, codes and
biases are made site after site (`compensate`), and the weight that was rounded there is rounded again to the other
widths. Other recipes have steps and codes from the table. Then for every variable and either of two widths, two bits
below the nominal one and one above: that variable moves, the blocks from its own on run anew from the kept residual
stream, and the divergence from the floating-point model is written down. Nothing else is compensated anew, so what is
measured is a slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lampq_rt.calibrate.compensate import compensate
from lampq_rt.calibrate.evidence import Measurements
from lampq_rt.calibrate.judge import Judge
from lampq_rt.calibrate.replay import Replay
from lampq_rt.calibrate.rounding import rounded
from lampq_rt.calibrate.spill import Shelf
from lampq_rt.calibrate.steps import site_params
from lampq_rt.calibrate.variables import Variable
from lampq_rt.formats import INTEGER_BITS, Format
from lampq_rt.plan import SiteParams
from lampq_rt.simulate import Simulation
from lampq_rt.sites import Site

BELOW = 2
"""Bits below the nominal width: one costs too little to be told from noise."""

IMAGES = 16
"""Images that answer, at most."""


def measure(
    measurements: Measurements, search: str, nominal: int, variables: Sequence[Variable], compensated: bool
) -> dict[str, dict[int, float]]:
    """Divergence (`Judge`, nats) by variable and width, narrowest first: a width below the nominal one and one above;
    itself where it is the narrowest or widest.

    Args:
        measurements: of the model.
        search: name of the range search.
        nominal: width of all sites.
        variables: what moves.
        compensated: True for the compensated nominal model, False for steps and codes of the table.
    """
    m = measurements
    beside = sorted({max(nominal - BELOW, INTEGER_BITS[0]), min(nominal + 1, INTEGER_BITS[-1])} - {nominal})
    m.simulation.reset()
    model = _Nominal(m, search, nominal, beside)
    quantised = model.compensated() if compensated else model.from_table()
    count = min(IMAGES, len(m.images))
    judge = Judge(m.images[:count], m.judge.logits[:count], None, count)
    found: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        replay = Replay(quantised, judge.images)
        still = {} if len(beside) > 1 else {nominal: judge.judge(replay(None)).divergence}
        for done, variable in enumerate(variables, 1):
            name, row = variable.site.name, dict(still)
            for width in beside:
                quantised.set({name: model.moved(variable, width)})
                row[width] = judge.judge(replay(variable.site.block)).divergence
            quantised.set({name: model.base(name)})
            found[variable.name] = dict(sorted(row.items()))
            m.report("measuring sensitivities", done, len(variables))
    return found


class _Nominal:
    """The model with every site at the nominal width, and its sites with one operand at a width beside it."""

    def __init__(self, measurements: Measurements, search: str, nominal: int, beside: Sequence[int]) -> None:
        self.measurements, self.search, self.nominal, self.beside = measurements, search, nominal, beside
        self._shelf = Shelf()

    def base(self, name: str) -> SiteParams:
        """The site at the nominal width."""
        return self._shelf.get(name)

    def moved(self, variable: Variable, width: int) -> SiteParams:
        """The variable's site with its operands at that width."""
        site, base = variable.site, self.base(variable.site.name)
        if site.is_matmul or (variable.whole and f"{site.name} {width}" not in self._shelf):
            return self._table(site, width)
        if variable.has_weight:
            base = self._shelf.get(f"{site.name} {width}")
        if "input" not in variable.operands:
            return base
        tensors = {key: t for key, t in base.tensors.items() if not key.startswith("input.")}
        formats, own = {**base.formats, "input": self._input_format(site, width)}, self._input(site, width)
        return replace(base, formats=formats, tensors={**tensors, **own})

    def from_table(self) -> Simulation:
        """Steps and codes of the table."""
        m = self.measurements
        quantised = Simulation(m.model).float().to(next(m.simulation.parameters()).device)
        sites = {site.name: self._formats(site, m.nearest(site, self.nominal)) for site in m.description.sites}
        for name, params in m.chosen(self.search, sites).items():
            self._shelf.put(name, params)
        for site in m.linears:
            for width in self.beside:
                formats = m.formats(site, width, self.nominal)
                self._shelf.put(f"{site.name} {width}", m.chosen(self.search, {site.name: formats})[site.name])
        quantised.set({site.name: self.base(site.name) for site in m.description.sites})
        return quantised

    def compensated(self) -> Simulation:
        """The nominal model as a compensating recipe leaves it, one step for all channels of every input."""
        m = self.measurements
        quantised = Simulation(m.model).float().to(next(m.simulation.parameters()).device)
        nominal = {
            site.name: SiteParams(site.kind, self._formats(site, m.nearest(site, self.nominal)), {}, site.params)
            for site in m.description.sites
        }
        found, _ = compensate(
            m.simulation,
            quantised,
            m.images.to(next(m.simulation.parameters()).device),
            nominal,
            prefix_shares=m.prefix_shares,
            search=self.search,
            seed=m.seed,
            progress=lambda done, total: m.report(f"compensating errors at {self.nominal} bits", done, total),
            rounded=self._round,
        )
        for name, params in found.items():
            self._shelf.put(name, params)
        return quantised

    def _round(self, site: Site, params: SiteParams, weight: Tensor, moment: Tensor) -> None:
        """Keep a linear of the blocks with its regressed weight rounded to the widths beside."""
        if site not in self.measurements.linears:
            return
        for width in self.beside:
            fmt = self.measurements.formats(site, width)["weight"]
            kept = {key: t for key, t in params.tensors.items() if not key.startswith("weight.")}
            own = {key: t.cpu() for key, t in {**kept, **rounded(weight, fmt, moment)}.items()}
            formats = {**params.formats, "weight": fmt}
            self._shelf.put(f"{site.name} {width}", replace(params, formats=formats, tensors=own))

    def _formats(self, site: Site, width: int) -> dict[str, Format]:
        """The site's formats, but one step for all channels: codes of the weight then fit any steps of the input."""
        formats = dict(self.measurements.formats(site, width))
        if "input" in formats:
            formats["input"] = self._input_format(site, width)
        return formats

    def _input_format(self, site: Site, width: int) -> Format:
        return replace(self.measurements.formats(site, width)["input"], granularity="tensor")

    def _table(self, site: Site, width: int) -> SiteParams:
        return self.measurements.params(self.search, {site.name: [width]})[site.name][width]

    def _input(self, site: Site, width: int) -> dict[str, Tensor]:
        """Steps of the input at that width."""
        m, formats = self.measurements, self._formats(site, width)
        if formats == m.formats(site, width):
            params = self._table(site, width)
        else:
            params = site_params(site, formats, m.observations[site.name], m.weights[site.name], self.search)
        return {key: tensor for key, tensor in params.tensors.items() if key.startswith("input.")}
