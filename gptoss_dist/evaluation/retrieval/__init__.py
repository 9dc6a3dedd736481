"""Whether a model finds a fact that stands somewhere in a long prompt: passkey retrieval and needle tasks."""
