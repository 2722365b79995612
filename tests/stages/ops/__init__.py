"""Tests of the tensor maths that stages share."""
