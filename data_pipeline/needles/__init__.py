"""Texts that hide a fact, and a question about it: passkey retrieval and needle tasks, for training and evaluation."""
