"""Wraps a model for training, from outside: experts, compiling, checkpointing of activations, sharding."""
