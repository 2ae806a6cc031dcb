"""AdaLog (2407.12951, section 3.2): levels s * 2^(-k q / r) with r = 37; s and q = 10..138 are searched together."""

from __future__ import annotations

from lampq_rt.calibrate.search.families.base import FAMILIES
from lampq_rt.calibrate.search.families.logarithmic import Logarithmic

R = 37
"""Denominator of the base's exponent."""

QS = range(10, 139)
"""Its numerators."""

FAMILIES.register("adalog")(Logarithmic([q / R for q in QS]))
