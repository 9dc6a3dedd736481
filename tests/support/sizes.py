"""Sizes of a small model, for tests that build one and do not care which."""

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}
