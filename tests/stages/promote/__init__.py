"""Tests of the promote stage."""
