"""What one would install instead: other runtimes, to be timed and judged beside ours. In a checkout: `pip install
'.[peers]'`.

One file a package, each at the setting that its makers recommend for speed. A builder here is a variant of `lampq
bench` like any other; its package is imported when it is built, and a package that is not there is an error with the
way to install it, which `lampq bench` reports before it goes on without.
"""

from lampq_rt.peers import onnxruntime as _onnxruntime  # noqa: F401  (registers its variants, imports no package)
from lampq_rt.peers import openvino as _openvino  # noqa: F401
from lampq_rt.peers import torchao as _torchao  # noqa: F401
from lampq_rt.peers.base import INSTALL, PEERS, Peer, installed, versions

GROUPS: dict[str, tuple[str, ...]] = {
    "openvino": ("openvino-bf16", "openvino-int8"),
    "onnxruntime": ("ort-static", "ort-dynamic"),
    "torchao": ("torchao-int8",),
    "peers": ("openvino-bf16", "openvino-int8", "ort-static", "ort-dynamic", "torchao-int8"),
}
"""Short names that `--against` takes."""

__all__ = ["GROUPS", "INSTALL", "PEERS", "Peer", "installed", "versions"]
