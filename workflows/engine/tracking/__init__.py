"""The ledger: journals what a run did, and tells MLflow of it exactly once."""
