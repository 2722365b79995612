"""Measures the speed and memory of models on the machine that its config names."""
