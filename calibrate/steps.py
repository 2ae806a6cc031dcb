"""From observations to the steps of every site at every width: the table that metrics and allocation choose from.

Weights are quantised first (`search.weight_mse`), then the input's range is searched against the quantised weight, so
that the table holds what will run. Sites do not see each other's quantisation: all observations are of the
floating-point model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lampq_rt.calibrate.observe import LinearObservation, Observation, Progress, PVObservation, QKObservation
from lampq_rt.calibrate.rounding import gptq, weighted_moment
from lampq_rt.calibrate.search import SEARCHES, Steps, weight_scale
from lampq_rt.calibrate.search.base import RangeSearch
from lampq_rt.calibrate.search.output_error import row_worth
from lampq_rt.errors import DataError, FormatError
from lampq_rt.formats import Format
from lampq_rt.plan import SiteParams
from lampq_rt.quantizers import QUANTIZERS
from lampq_rt.simulate import SimulatedLinear, Simulation
from lampq_rt.sites import Kind, Site

DEFAULT_SEARCH = "output-error"

_Solver = Callable[[Mapping[str, Format]], dict[str, Tensor]]
"""Formats of a site's operands, none of them float, to its tensors."""


def site_params(
    site: Site,
    formats: Mapping[str, Format],
    observation: Observation,
    weight: Tensor | None,
    search: str = DEFAULT_SEARCH,
    rounding: str = "nearest",
) -> SiteParams:
    """Steps of one site in one choice of formats.

    Args:
        site: whose steps to choose.
        formats: a format per operand, as `lampq_rt.backends.formats` gives.
        observation: of that site, from `observe`.
        weight: fp32 [N, ...] for a linear; None for a matmul.
        search: name of a range search.
        rounding: of weights, "nearest" or "gptq".

    Returns:
        Tensors as `lampq_rt.plan.SiteParams` says, on the CPU; none where the formats are float.

    Raises:
        UnknownNameError: no search has that name.
        DataError: the weight holds a NaN or infinity.
    """
    return _fill(site, formats, _solver(site, observation, weight, search, rounding))


def step_table(
    simulation: Simulation,
    observations: Mapping[str, Observation],
    menu: Mapping[str, Sequence[Mapping[str, Format]]],
    search: str = DEFAULT_SEARCH,
    progress: Progress | None = None,
    rounding: str = "nearest",
) -> dict[str, dict[int, SiteParams]]:
    """Steps of every site of `menu` at every width offered there.

    Args:
        simulation: holds the sites and their weights; not changed.
        observations: from `observe`.
        menu: by site name, the choices of formats, as `lampq_rt.backends.menu` gives; one per width.
        search: name of a range search.
        progress: called with the number of sites done and their number after each site.
        rounding: of weights, "nearest" or "gptq".

    Returns:
        By site name, then by width (16: floating point, without tensors), in the order of `menu`.

    Raises:
        UnknownNameError: no search has that name.
        FormatError: two choices of one site have the same width.
        DataError: a weight holds a NaN or infinity.
    """
    sites = {site.name: site for site in simulation.description.sites}
    table: dict[str, dict[int, SiteParams]] = {}
    for done, (name, choices) in enumerate(menu.items(), 1):
        module = simulation.module(name)
        weight = module.original.weight.detach() if isinstance(module, SimulatedLinear) else None
        solver = _solver(sites[name], observations[name], weight, search, rounding)
        table[name] = {}
        for formats in choices:
            params = _fill(sites[name], formats, solver)
            if params.bits in table[name]:
                raise FormatError(f"site {name!r}: the menu offers {params.bits} bits twice")
            table[name][params.bits] = params
        if progress is not None:
            progress(done, len(menu))
    return table


def _fill(site: Site, formats: Mapping[str, Format], solver: _Solver) -> SiteParams:
    tensors = {} if all(f.is_float for f in formats.values()) else solver(formats)
    return SiteParams(site.kind, dict(formats), tensors, site.params)


@torch.no_grad()
def _solver(site: Site, observation: Observation, weight: Tensor | None, search: str, rounding: str) -> _Solver:
    """What the search prepares once for all widths of a site."""
    chosen = SEARCHES.get(search)
    if site.kind is Kind.QK:
        assert isinstance(observation, QKObservation), site.name
        solve_qk = chosen.qk(observation)
        return lambda formats: _tensors(dict(zip(("q", "k"), solve_qk(formats["q"]), strict=True)))
    if site.kind is Kind.PV:
        assert isinstance(observation, PVObservation), site.name
        solve_pv = chosen.pv(observation)
        return lambda formats: _tensors({"v": solve_pv(formats["v"])})
    assert isinstance(observation, LinearObservation) and weight is not None, site.name
    rows = weight.detach().flatten(1).float()
    if not bool(rows.isfinite().all()):
        raise DataError(f"site {site.name!r}: its weight holds a NaN or infinity")
    solvers: dict[str, LinearSteps] = {}

    def solve(formats: Mapping[str, Format]) -> dict[str, Tensor]:
        granularity = formats["input"].granularity
        if granularity not in solvers:
            solvers[granularity] = LinearSteps(chosen, observation, rows, granularity == "channel", rounding)
        return _tensors(*solvers[granularity](formats["weight"], formats["input"]))

    return solve


class LinearSteps:
    """Steps and codes of one linear, prepared once for all widths.

    With a step for every input channel, the search sees (x - shift) / spread and a weight whose columns are multiplied
    by spread: there one step serves all channels.

    Args:
        search: of the input's range.
        seen: the input.
        weight: fp32 [N, K].
        by_channel: True for a step a channel of the input.
        rounding: "nearest" or "gptq".
    """

    def __init__(
        self, search: RangeSearch, seen: LinearObservation, weight: Tensor, by_channel: bool, rounding: str
    ) -> None:
        self.shift = self.spread = None
        if by_channel:
            self.shift, self.spread = channel_spread(seen, weight)
            rows = (seen.rows - self.shift) / self.spread
            low, high = (float(end) for end in rows.aminmax())
            seen, weight = LinearObservation(rows, low, high, seen.row_weight), weight * self.spread
        self.seen, self.weight, self.rounding = seen, weight, rounding
        self.solve = search.linear(seen, weight)

    def __call__(self, weight_format: Format, input_format: Format) -> tuple[dict[str, Steps], Tensor | None]:
        """Steps by operand, and int8 [N, K] codes where rounding to nearest does not give them."""
        bits = weight_format.bits
        scale = weight_scale(self.weight, bits)
        quantizer = QUANTIZERS.get(weight_format.scheme)
        weight_hat = quantizer.fake_quantize(self.weight, scale[:, None], None, bits, weight=True)
        fmt = replace(input_format, granularity="tensor")
        found = self.solve(fmt, weight_hat)
        codes = None if self.rounding == "nearest" else self._codes(found, fmt, scale, bits)
        if self.shift is None or self.spread is None:
            return {"weight": Steps(scale), "input": found}, codes
        zero_point = 0.0 if found.zero_point is None else found.zero_point
        channels = found.scale * self.spread
        steps = Steps(channels, (zero_point - self.shift / channels).float())
        return {"weight": Steps(scale * found.scale), "input": steps}, codes

    def _codes(self, steps: Steps, fmt: Format, scale: Tensor, bits: int) -> Tensor:
        quantizer = QUANTIZERS.get(fmt.scheme)
        x_hat = quantizer.fake_quantize(self.seen.rows, steps.scale, steps.zero_point, fmt.bits)
        moment = weighted_moment(x_hat, row_worth(self.seen, self.weight))
        return gptq(self.weight, scale, moment, bits)


PARAMS=(.5,.5,1.,'sigma')
def channel_spread(seen: LinearObservation, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and spread of every input channel, fp32 [K]: (x - shift) / spread is what one step serves well.

    Spread balances what a step costs (see `transforms.equalize`): sqrt(sigma_k / ||w_k||), floored so that constant
    channels do no harm.
    """
    share = torch.ones(len(seen.rows)) if seen.row_weight is None else seen.row_weight
    share = (share / share.sum()).to(seen.rows)
    mean = share @ seen.rows
    A,B,SH,KIND=PARAMS
    if KIND=="sigma":
        sigma = (share @ (seen.rows - mean).square()).sqrt()
    elif KIND=="rms":
        sigma = (share @ seen.rows.square()).sqrt()
    elif KIND=="max":
        sigma = seen.rows.abs().amax(0)
    elif KIND=="q":
        sigma = seen.rows.abs().quantile(0.99,dim=0)
    norm = weight.norm(dim=0)
    norm = norm.clamp_min(1e-3 * float(norm.max()) + 1e-30)
    spread = sigma**A/norm**B
    mean = mean*SH
    spread = spread.clamp_min(1e-2 * float(spread.max()) + 1e-30)
    return mean, spread


def _tensors(steps: Mapping[str, Steps], codes: Tensor | None = None) -> dict[str, Tensor]:
    """By key of a plan, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for operand, found in steps.items():
        tensors[f"{operand}.scale"] = found.scale.cpu()
        if found.zero_point is not None:
            tensors[f"{operand}.zero_point"] = found.zero_point.cpu()
    if codes is not None:
        tensors["weight.codes"] = codes.cpu()
    return tensors
