"""What runs, in what order: workflows as functions, the engine that runs them, and the command."""
