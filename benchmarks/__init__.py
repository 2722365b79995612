"""What a claim of speed or size is measured with."""
