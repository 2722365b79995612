"""Tests mirror the tree; `references.py` holds the float64 references, `fakes.py` the seams."""
