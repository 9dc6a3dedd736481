"""Attention with learned sinks: one function, `sink_attention.sink_attention`, and its back ends."""
