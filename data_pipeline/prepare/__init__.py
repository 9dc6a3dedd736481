"""The command `python -m data_pipeline.prepare`: text in, a dataset out, whole or not at all."""
