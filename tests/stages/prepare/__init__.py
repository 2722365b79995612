"""Tests of the prepare stage."""
