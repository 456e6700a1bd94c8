"""Tensor parallelism: a model computed by several ranks together."""
