"""Publishes runs to MLflow: events are folded to a view of the run, and the view is upserted."""
