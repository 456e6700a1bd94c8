"""Native kernels, and the pure PyTorch reference of each."""
