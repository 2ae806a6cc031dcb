"""What a linear alone does: the divergence of the answers when every other site is in floating point.

    penalty(b) = D(n) * P(b) / P(n)

D(n) is measured, with the linear at the nominal width n; P is its curve of `fisher-output`, which says what other
widths do. Unlike the step from one quantised model to another (`measured`) such a divergence has no chaos in it: around
the floating-point model it is a quadratic form of the linear's errors, which `fisher-output` takes for a diagonal. Of
few-bit inputs that is near enough: their errors are as good as independent. Those of a weight are not, each moves all
tokens alike: with 8-bit inputs P is between 0.8 (first block) and a third (middle blocks) of D on DeiT-Tiny at 3 bits,
and bits go to the wrong blocks.
"""

from __future__ import annotations

from lampq_rt.calibrate.metrics.base import PENALTIES, Evidence, Score
from lampq_rt.calibrate.metrics.fisher_output import penalty as predicted


@PENALTIES.register("alone")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; tied widths only. The sensitivity is the measured divergence, in nats."""
    penalties, found = {}, evidence.alone
    for name, curve in predicted(evidence).penalties.items():
        ((nominal, divergence),) = found[name].items()
        factor = divergence / curve[nominal] if curve[nominal] > 0.0 else 1.0
        penalties[name] = {bits: factor * value for bits, value in curve.items()}
    return Score(penalties, {site.name: sum(found[site.name].values()) for site in evidence.sites})
