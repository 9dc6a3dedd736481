"""What a run records: metrics, plots, expert tokens, profiles, progress, and its mirror in MLflow."""
