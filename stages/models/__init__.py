"""What several stages do with a model: load, save, check that it fits, read its tokenizer."""
