"""Layers: each holds its weights, names its slots in the checkpoint, and computes. Plain PyTorch, the reference."""
