"""RepQ-ViT (2212.08254, section 3.3): levels s * 2^(-k / 2); published for softmax output."""

from __future__ import annotations

from lampq_rt.calibrate.search.families.base import FAMILIES
from lampq_rt.calibrate.search.families.logarithmic import Logarithmic

FAMILIES.register("log-sqrt2")(Logarithmic([0.5]))
