"""Tensor maths that two stages use: pure, no I/O, no config."""
