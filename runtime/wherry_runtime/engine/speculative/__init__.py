"""Speculative decoding: guess several tokens cheaply, check them all in one step of the model."""
