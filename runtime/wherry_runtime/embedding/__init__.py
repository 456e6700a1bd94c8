"""Texts to vectors: pooling, batching, and the engine of models that do nothing else."""
