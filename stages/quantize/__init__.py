"""Model to quantized candidates: schemes searched in Ray Tune trials, the best of them reloaded and measured again."""
