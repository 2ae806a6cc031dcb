"""Measured sensitivities: the divergence of the whole model when one variable alone gets fewer bits or more.

Two widths are measured for each (`calibrate/moves.py`), l below and h above the nominal one. What other widths do is
told by the curve of `fisher-output` of that very variable, P, which knows its quantiser's errors. The penalty is f * P,
with f a correction of the prediction by the measurement D, in nats per nat:

    f = m + w (r - m),    r = (D(l) - D(h)) / p,    p = P(l) - P(h),    m = sum of all D(l) - D(h) / sum of all p

w, 0..1, is how far a measurement is believed. Rounding is chaotic: whatever moves, the divergence of a few images
changes, by 0.015 on DeiT-Tiny at 4 bits, where a bit less of an average variable should cost 0.003 (predicted). That
noise s is seen in D(h), since a bit more changes least. With the true corrections spread about m by `SPREAD` of it, the
least error is expected at w = (SPREAD m p)^2 / ((SPREAD m p)^2 + 2 s^2): a sensitive variable is corrected, others keep
the prediction.
"""

from __future__ import annotations

from statistics import pstdev

from lampq_rt.calibrate.metrics.base import PENALTIES, Curves, Evidence, Score
from lampq_rt.calibrate.metrics.fisher_output import penalty as predicted

SPREAD = 0.3
"""Of true corrections about their mean, as a share of it. With 1, KL of ViT-Tiny at 4 bits is 0.654 instead of 0.554:
the few variables that noise calls insensitive lose bits."""

LEAST = 0.1
"""Smallest f, as a share of m."""


@PENALTIES.register("measured")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; the sensitivity of a linear is its share of the divergence at the lower width, in nats."""
    curves, moves = predicted(evidence).penalties, evidence.moves
    factors = corrections(curves, moves)
    penalties = {name: {bits: factors[name] * p for bits, p in row.items()} for name, row in curves.items()}
    sensitivity = {site.name: 0.0 for site in evidence.sites}
    for variable in evidence.variables:
        if variable.site.name in sensitivity:
            sensitivity[variable.site.name] += penalties[variable.name][min(moves[variable.name])]
    facts = {"moves": {name: {str(w): d for w, d in row.items()} for name, row in moves.items()}, "factors": factors}
    return Score(penalties, sensitivity, facts)


def corrections(curves: Curves, moves: Curves) -> dict[str, float]:
    """f by variable, positive.

    Args:
        curves: predicted penalties by variable and width.
        moves: measured divergences by variable, at two widths or more, the same of all variables.
    """
    changes, expected = {}, {}
    for name, row in moves.items():
        low, high = min(row), max(row)
        changes[name] = row[low] - row[high]
        expected[name] = curves[name][low] - curves[name][high]
    if not sum(changes.values()) > 0.0 or not sum(expected.values()) > 0.0:  # noise alone
        return dict.fromkeys(moves, 1.0)
    middle = sum(changes.values()) / sum(expected.values())
    noise = pstdev([row[max(row)] for row in moves.values()])
    found = {}
    for name, change in changes.items():
        own = middle * expected[name]
        trust = (SPREAD * own) ** 2 / ((SPREAD * own) ** 2 + 2 * noise**2) if own > 0.0 else 0.0
        found[name] = middle * max(1.0 + trust * (change / own - 1.0), LEAST) if own > 0.0 else middle
    return found
