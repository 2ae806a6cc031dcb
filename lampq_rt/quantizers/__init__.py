"""Number formats: what a code means. One file each, behind the protocol in `base`."""

from collections.abc import Mapping

from torch import Tensor

from lampq_rt.formats import Format
from lampq_rt.quantizers import cubic, levels, log2, rowmax, table, uniform  # noqa: F401  (each registers itself)
from lampq_rt.quantizers.base import QUANTIZERS, Quantizer

__all__ = ["QUANTIZERS", "Quantizer", "flaw"]

_FLAWS = {"input.table": table.flaw, "weight.levels": levels.flaw}


def flaw(key: str, tensor: Tensor, formats: Mapping[str, Format]) -> str | None:
    """What is wrong with a site's tensor of that key in a plan, beyond dtype and shape; None where nothing is."""
    found = _FLAWS.get(key)
    return None if found is None else found(tensor, formats[key.partition(".")[0]].bits)
