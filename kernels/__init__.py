"""Integer kernels for Vision Transformers: schema, reference, CPU (oneDNN and C++), GPU (Triton). Knows tensors, knows no model."""
