"""Following a run from outside: what its folder tells while it trains, on a terminal. Nothing here imports torch."""
