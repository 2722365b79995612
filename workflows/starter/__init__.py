"""The workflow file that `stillhouse init` copies for a user to start from."""
