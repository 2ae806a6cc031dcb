"""Integer kernels for Vision Transformers: schema, reference, CPU (oneDNN and C++). Knows tensors, no model."""
