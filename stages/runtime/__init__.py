"""What surrounds a stage's work: resources as Ray takes them, errors translated, libraries kept quiet."""
