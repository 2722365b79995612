"""Data from outside: paths, globs and hub ids, resolved to digests and revisions."""
