"""What several test modules use: runs of the commands, forked processes, layouts to compare, references, data."""
