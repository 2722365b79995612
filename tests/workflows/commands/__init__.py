"""Tests of what the command is made of."""
