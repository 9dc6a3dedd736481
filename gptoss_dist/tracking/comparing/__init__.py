"""Comparison of runs: what differs, losses at equal cost, and which differences are more than noise."""
