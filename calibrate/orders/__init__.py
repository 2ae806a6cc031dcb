"""In which order the parts of a model train. One file each, behind the protocol in `base`."""

from lampq_rt.calibrate.orders import blocks, together  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.orders.base import ORDERS, Course, Order, Rates, Unit

__all__ = ["ORDERS", "Course", "Order", "Rates", "Unit"]
