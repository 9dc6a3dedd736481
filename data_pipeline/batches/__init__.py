"""From shards to batches: the order of samples, their packing, mixtures, and the loader."""
