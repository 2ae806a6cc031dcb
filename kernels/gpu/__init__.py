"""The GPU's side of the ops: Triton kernels, launchers, configurations. Imported when a CUDA tensor comes."""
