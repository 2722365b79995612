"""What the `stillhouse` command is made of: options, parameters, what it prints, what it looks up."""
