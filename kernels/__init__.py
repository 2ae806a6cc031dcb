"""Integer kernels for Vision Transformers: schema, reference, CPU (C++ and oneDNN). Knows tensors, no model."""
