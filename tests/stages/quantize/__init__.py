"""Tests of `stages.quantize`."""
