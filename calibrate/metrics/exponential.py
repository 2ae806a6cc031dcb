"""The printed penalty of LampQ (AAAI-26, section 4.3): gamma^(-B) * Omega_i, with Omega_i = alpha_t(i) * tr(F_i).

It knows neither the range of the weights nor the activations: two layers with equal Omega get equal bits whatever
their errors.
"""

from __future__ import annotations

from lampq_rt.calibrate.metrics.base import PENALTIES, Evidence, Score

GAMMA = 4.0
"""Not printed in the paper; squared error falls fourfold with each bit of a uniform quantiser."""


@PENALTIES.register("exponential")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; the sensitivity is Omega_i, in points of accuracy (or nats) as alpha is."""
    traces = {site.name: evidence.fisher[site.name].trace for site in evidence.sites}
    alpha = evidence.drops.alpha(traces)
    omega = {site.name: alpha[site.kind] * traces[site.name] for site in evidence.sites}
    penalties = {name: {bits: GAMMA**-bits * omega[name] for bits in evidence.table[name]} for name in omega}
    return Score(penalties, omega, {"gamma": GAMMA, **evidence.drops.facts(alpha)})
