"""The model: pure math on one device, read best from `transformer.py` on."""
