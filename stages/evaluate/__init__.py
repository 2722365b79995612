"""Scores the quality of models on held-out text: perplexity, divergence from a reference, agreement with it."""
