"""Which request runs when, and in which KV cache blocks. Pure: no torch, no clock, no I/O."""
