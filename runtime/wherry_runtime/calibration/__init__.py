"""Quantizing a checkpoint: text goes through the real model, and each layer is written as it is done."""
