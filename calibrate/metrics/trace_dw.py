"""HAWQ-V2's penalty (NeurIPS 2020, section 3.1) with Fisher's trace for the Hessian's: tr(F_i)/n_i * ||W_hat - W||^2.

The second-order change of the loss for an error of the weight that has no preferred direction, in nats; it knows the
weights' ranges and their clipping, but not the error of the activations.
"""

from __future__ import annotations

from lampq_rt.calibrate.metrics.base import PENALTIES, Evidence, Score
from lampq_rt.weights import quantized_weight


@PENALTIES.register("trace-dw")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; the sensitivity is tr(F_i)/n_i, nats^2 per unit of weight squared."""
    sensitivity = {site.name: evidence.fisher[site.name].trace / site.params for site in evidence.sites}
    penalties = {}
    for name, factor in sensitivity.items():
        weight = evidence.weights[name]
        penalties[name] = {
            bits: 0.0
            if params.is_float
            else 0.5 * factor * float((quantized_weight(weight, params) - weight).square().sum())
            for bits, params in evidence.table[name].items()
        }
    return Score(penalties, sensitivity)
