"""Tests of `stages.teach`."""
