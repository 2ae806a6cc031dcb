"""Measured sensitivities: the divergence of the whole model when one variable alone gets a bit more or less.

Only the widths beside the nominal one are measured (`calibrate/moves.py`). What other widths do is told by the curve
of `fisher-output` of that very variable, P, which knows its quantiser's errors: the penalty is f * P, with

    f = (D(b-1) - D(b+1)) / (P(b-1) - P(b+1)),    D: the measured divergence, b: the nominal width

(b itself in the place of a width that there is not). f is a correction of the prediction by a measurement, in nats
per nat. A divergence of a few images has noise, so f is pulled to the median of all variables: their logarithms are
averaged with weight `TRUST` for the own, and one below `LEAST` of the median counts as that much.
"""

from __future__ import annotations

import math
from statistics import median

from lampq_rt.calibrate.metrics.base import PENALTIES, Curves, Evidence, Score
from lampq_rt.calibrate.metrics.fisher_output import penalty as predicted

LEAST = 0.1
TRUST = 0.5


@PENALTIES.register("measured")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; the sensitivity of a linear is its share of the divergence that a bit less costs, in nats."""
    curves, moves = predicted(evidence).penalties, evidence.moves
    factors = corrections(curves, moves)
    penalties = {name: {bits: factors[name] * p for bits, p in row.items()} for name, row in curves.items()}
    sensitivity = {site.name: 0.0 for site in evidence.sites}
    for variable in evidence.variables:
        if variable.site.name in sensitivity:
            sensitivity[variable.site.name] += penalties[variable.name][min(moves[variable.name])]
    facts = {"moves": {name: {str(w): d for w, d in row.items()} for name, row in moves.items()}}
    return Score(penalties, sensitivity, facts)


def corrections(curves: Curves, moves: Curves, least: float = LEAST, trust: float = TRUST) -> dict[str, float]:
    """f by variable, positive.

    Args:
        curves: predicted penalties by variable and width.
        moves: measured divergences by variable, at two widths or more.
        least: smallest f, as a share of the median.
        trust: weight of the own logarithm beside that of the median, 0..1.
    """
    raw = {}
    for name, row in moves.items():
        low, high = min(row), max(row)
        change = curves[name][low] - curves[name][high]
        raw[name] = (row[low] - row[high]) / change if change > 0.0 else 0.0
    middle = median(raw.values()) if raw else 0.0
    if middle <= 0.0:  # noise alone
        return dict.fromkeys(raw, 1.0)
    return {name: middle * math.exp(trust * math.log(max(f / middle, least))) for name, f in raw.items()}
