"""Number formats: what a code means. One file each, behind the protocol in `base`."""

from lampq_rt.quantizers import cubic, levels, log2, rowmax, table, uniform  # noqa: F401  (each registers itself)
from lampq_rt.quantizers.base import QUANTIZERS, Quantizer

__all__ = ["QUANTIZERS", "Quantizer"]
