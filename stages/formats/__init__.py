"""What artifacts hold: one model for each kind's JSON, and the token and signal shards; written and read here only."""
