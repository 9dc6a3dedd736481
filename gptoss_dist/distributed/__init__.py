"""Who runs where and how ranks agree: processes, launchers, collectives, signals."""
