"""Function-preserving rewrites of the model. One file each, behind the protocol in `base`."""

from lampq_rt.calibrate.transforms import equalize, heads, norms, rotation  # noqa: F401  (each registers itself)
from lampq_rt.calibrate.transforms.base import TRANSFORMS, Context, Transform

__all__ = ["TRANSFORMS", "Context", "Transform"]
