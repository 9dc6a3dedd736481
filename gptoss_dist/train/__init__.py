"""A training run: the loop, where it starts, its data, its periodic tasks and what it reports."""
