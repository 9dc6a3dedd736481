"""What a trained model can do and what it costs: each measurement is a verb of `launch/evaluate.py`."""
