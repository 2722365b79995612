"""Dataset (and signals, or a teacher to start from) → model."""
