"""The Fisher-weighted error of a layer's output, both operands quantised:

    1/2 * E_n sum over tokens and channels of (dl/dy)^2 * (y_hat - y)^2,    y = W x,  y_hat = W_hat x_hat.

The second-order change of the loss (nats), the Fisher matrix with respect to y taken as diagonal. Unlike the trace of
the weight's Fisher matrix it sees the clipping, the rounding of this very weight, and the error of the input, which
at equal widths is most of it. Where weight and input have variables of their own, the error of each is taken alone;
for the attention matmuls, `attention` measures the same at attention's output.

"fisher-output" takes inputs and gradients from the floating-point model; it predicts what quantising one layer alone
does. "fisher-context" takes them from the model with every site at the nominal width (`context`): what one more or
one less bit does where the plan will work, among the errors of all other layers. At few bits the two differ by depth
and type, and only the second is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lampq_rt.calibrate.metrics.base import PENALTIES, Curves, Evidence, Score
from lampq_rt.calibrate.metrics.fisher import Fisher
from lampq_rt.calibrate.variables import Variable
from lampq_rt.formats import INTEGER_BITS
from lampq_rt.inputs import quantized_input
from lampq_rt.plan import SiteParams
from lampq_rt.weights import quantized_weight


@PENALTIES.register("fisher-output")
def penalty(evidence: Evidence) -> Score:
    """See `Penalty`; the sensitivity is the squared output gradient, summed over tokens, mean over channels."""
    return _score(evidence, evidence.fisher, lambda: evidence.attention)


@PENALTIES.register("fisher-context")
def penalty_in_context(evidence: Evidence) -> Score:
    """As `penalty`, at the operating point of the model with every site at the nominal width."""
    return _score(evidence, evidence.context, lambda: evidence.attention_context)


def _score(evidence: Evidence, fisher: Mapping[str, Fisher], attention: Callable[[], Curves]) -> Score:
    """Of tied widths, the error of both operands together; of free ones, that of each alone: independent errors add."""
    own: dict[str, list[Variable]] = {}
    for variable in evidence.variables:
        own.setdefault(variable.site.name, []).append(variable)
    penalties: dict[str, Mapping[int, float]] = {}
    for name, variables in own.items():
        if variables[0].site.is_matmul:
            penalties[name] = attention()[name]
            continue
        seen, weight = fisher[name], evidence.weights[name]
        exact = seen.rows @ weight.t()
        for variable in variables:
            penalties[variable.name] = {
                bits: 0.5 * float((seen.weights * (output(seen.rows, weight, params, variable) - exact).square()).sum())
                for bits, params in evidence.table[name].items()
                if "input" not in variable.operands or bits in INTEGER_BITS
            }
    return Score(penalties, {site.name: float(fisher[site.name].output.mean()) for site in evidence.sites})


def output(rows: Tensor, weight: Tensor, params: SiteParams, variable: Variable | None = None) -> Tensor:
    """W_hat x_hat of a linear without its bias.

    Args:
        rows: fp32 [R, K].
        weight: fp32 [N, K], in floating point.
        params: formats and steps of both operands.
        variable: whose operands are quantised; by default both.

    Returns:
        fp32 [R, N].
    """
    if params.is_float:
        return rows @ weight.t()
    operands = ("weight", "input") if variable is None else variable.operands
    x = quantized_input(rows, params) if "input" in operands else rows
    return x @ (quantized_weight(weight, params) if "weight" in operands else weight).t()
