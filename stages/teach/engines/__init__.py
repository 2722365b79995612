"""Where a teacher's logits come from: one file an engine."""
