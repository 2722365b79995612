"""Judges candidates by a gate of limits, names the champion, and writes the report that people read."""
