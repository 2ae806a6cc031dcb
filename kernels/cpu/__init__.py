"""The CPU's side of the ops: C++ kernels on AVX512-VNNI, oneDNN int8 matmuls and eager torch elsewhere."""

from lampq_rt.kernels.cpu.machine import has_vnni

__all__ = ["has_vnni"]
