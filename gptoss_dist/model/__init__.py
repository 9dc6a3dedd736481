"""The model: pure math on one device."""
