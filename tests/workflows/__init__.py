"""Tests of the workflows and their engine."""
