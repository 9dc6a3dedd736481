"""Commands on prepared datasets: adopt, merge, split, inspect, verify; and training a vocabulary."""
