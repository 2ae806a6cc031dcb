"""From observations to the steps of every site at every width, which metrics and allocation choose from.

Weights are quantised first (`search.weight_mse`), then the input's range is searched against the quantised weight, so
that what is found is what will run. Sites do not see each other's quantisation: all observations are of the
floating-point model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lampq_rt.calibrate.linear_steps import LinearSteps
from lampq_rt.calibrate.observe import LinearObservation, Observation, Progress, PVObservation, QKObservation
from lampq_rt.calibrate.search import SEARCHES, Steps
from lampq_rt.errors import DataError, FormatError
from lampq_rt.formats import Format
from lampq_rt.memory import trim
from lampq_rt.plan import SiteParams
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
    family: str = "optimal",
) -> SiteParams:
    """Steps of one site in one choice of formats.

    Args:
        site: whose steps to choose.
        formats: a format per operand, as `lampq_rt.backends.formats` gives.
        observation: of that site, from `observe`.
        weight: fp32 [N, ...] for a linear; None for a matmul.
        search: name of a range search.
        rounding: of weights, "nearest" or "gptq".
        family: of levels, where the input has a table.

    Returns:
        Tensors as `lampq_rt.plan.SiteParams` says, on the CPU; none where the formats are float.

    Raises:
        UnknownNameError: no search, or no family of levels, has that name.
        DataError: the weight holds a NaN or infinity.
    """
    return _fill(site, formats, _solver(site, observation, weight, search, rounding, family))


def searched(
    simulation: Simulation,
    observations: Mapping[str, Observation],
    menu: Mapping[str, Sequence[Mapping[str, Format]]],
    search: str = DEFAULT_SEARCH,
    progress: Progress | None = None,
    rounding: str = "nearest",
    family: Callable[[Kind], str] = lambda kind: "optimal",
) -> Iterator[tuple[str, SiteParams]]:
    """Steps of every site of `menu` in every choice of formats offered there, one after the other.

    Nothing that was handed over is held: codes of all widths together (`rounding`) are twice an fp32 model.

    Args:
        simulation: holds the sites and their weights; not changed.
        observations: from `observe`.
        menu: by site name, the choices of formats, as `lampq_rt.backends.menu` gives; one per width.
        search: name of a range search.
        progress: called with the number of sites done and their number after each site.
        rounding: of weights, "nearest" or "gptq".
        family: by kind of site, of the levels where an input has a table.

    Yields:
        Name and parameters (16 bits: floating point, without tensors), in the order of `menu`.

    Raises:
        UnknownNameError: no search, or no family of levels, has that name.
        FormatError: two choices of one site have the same width.
        DataError: a weight holds a NaN or infinity.
    """
    sites = {site.name: site for site in simulation.description.sites}
    for done, (name, choices) in enumerate(menu.items(), 1):
        module = simulation.module(name)
        weight = module.original.weight.detach() if isinstance(module, SimulatedLinear) else None
        site = sites[name]
        solver = _solver(site, observations[name], weight, search, rounding, family(site.kind))
        widths = set[int]()
        for formats in choices:
            params = _fill(site, formats, solver)
            if params.bits in widths:
                raise FormatError(f"site {name!r}: the menu offers {params.bits} bits twice")
            widths.add(params.bits)
            yield name, params
            del params
            trim()
        del solver  # its samples, before the next site's are read
        trim()
        if progress is not None:
            progress(done, len(menu))


def _fill(site: Site, formats: Mapping[str, Format], solver: _Solver) -> SiteParams:
    tensors = {} if all(f.is_float for f in formats.values()) else solver(formats)
    return SiteParams(site.kind, dict(formats), tensors, site.params)


@torch.no_grad()
def _solver(
    site: Site,
    observation: Observation,
    weight: Tensor | None,
    search: str,
    rounding: str,
    family: str,
) -> _Solver:
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
            by_channel = granularity == "channel"
            solvers[granularity] = LinearSteps(chosen, observation, rows, by_channel, rounding, family)
        return solvers[granularity](site, formats)

    return solve


def _tensors(steps: Mapping[str, Steps]) -> dict[str, Tensor]:
    """By key of a plan, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for operand, found in steps.items():
        tensors[f"{operand}.scale"] = found.scale.cpu()
        if found.zero_point is not None:
            tensors[f"{operand}.zero_point"] = found.zero_point.cpu()
    return tensors
