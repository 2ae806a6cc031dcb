"""Bytes of the model's tensors in memory, in the containers that the kernels read (docs/numerics.md).

Codes of at most 4 bits lie two to a byte where K is a multiple of 64, all wider ones (and those with another K) in
one byte each: 3 bits cost what 4 do, and 5 what 8 do. A weight left in floating point counts 4 bytes an element: what
it takes on a CPU. LayerScale is counted although the compiler folds it away: with it, the cost is an upper bound. On
disk, codes are packed at exactly their width; that is reported with the checkpoint and is not this cost.
"""

from __future__ import annotations

from torch import nn

from lampq_rt.backends import Formats
from lampq_rt.calibrate.costs.base import COSTS
from lampq_rt.kernels.containers import LEVELS
from lampq_rt.kernels.reference import NIBBLE_GROUP
from lampq_rt.quantizers.table import ENTRIES
from lampq_rt.sites import Description, Kind, Site

FLOAT_BYTES = 4
CHANNEL_BYTES = 8
"""Step (fp32) and column constant (int32) of each output channel of an integer linear."""

VECTOR_BYTES = 8
"""1/step and zero-point (fp32) of each input channel, where a linear's input has them by channel."""

TABLE_BYTES = ENTRIES
"""Levels of an input's table, a byte each."""

PACKED_BITS = 4

DIGEST_BYTES = 32
"""The plan's SHA-256, which a compiled model carries."""


@COSTS.register("weight_bytes")
class WeightBytes:
    """Codes, steps and column constants of the sites, and all that stays: embeddings, norms, biases. Unit: bytes."""

    def __init__(self, model: nn.Module, description: Description) -> None:
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        elements = sum(t.numel() for t in tensors.values())
        self.full = float(FLOAT_BYTES * elements)
        kept = elements - sum(site.params for site in description.sites)
        self.constant = float(FLOAT_BYTES * kept + DIGEST_BYTES)

    def of(self, site: Site, formats: Formats) -> float:
        """See `Cost.of`."""
        if site.is_matmul:
            return 0.0 if all(f.is_float for f in formats.values()) else self._matmul(site)
        weight = formats["weight"]
        if weight.is_float:
            return float(FLOAT_BYTES * site.params)
        packed = weight.bits <= PACKED_BITS and site.in_features % NIBBLE_GROUP == 0
        vectors = VECTOR_BYTES * site.in_features if formats["input"].granularity == "channel" else 0
        table = TABLE_BYTES if formats["input"].scheme == "table" else 0
        table += LEVELS if packed and weight.scheme == "levels" else 0
        codes = (site.params + 1) // 2 if packed else site.params
        return float(codes + CHANNEL_BYTES * site.out_features + vectors + table)

    @staticmethod
    def _matmul(site: Site) -> float:
        """QK^T holds 1/step of every column of q, k and v, and a logit scale per head; PV a step per head. All fp32."""
        steps = 3 * site.heads * site.in_features if site.kind is Kind.QK else 0
        return float(FLOAT_BYTES * (steps + site.heads))
