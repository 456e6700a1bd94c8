"""Triton kernels for CUDA, and the model that runs on them."""
