"""What a run's folder says, without torch: its metrics as arrays, its settings, and what happened to it."""
