"""Delivery of a run's local files to MLflow."""
