"""How one kind of work is done: one folder a verb, usable without workflows."""
