"""The GPU's side of the ops: Triton kernels, their launchers and configurations. Imported only when a CUDA tensor comes."""
