"""The CPU's side of the ops: oneDNN int8 matmuls, C++ for what lies between them, eager torch without a compiler."""

from lampq_rt.kernels.cpu.machine import has_vnni

__all__ = ["has_vnni"]
