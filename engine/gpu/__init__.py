"""Networks and kernels for CUDA devices."""
