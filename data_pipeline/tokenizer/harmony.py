"""Harmony, the conversation format of GPT-OSS, for tokenizers that have its special tokens.

`harmony.jinja` beside this file is the template by which transformers, TRL, vLLM and llama.cpp turn messages into text.
"""

from __future__ import annotations

from importlib import resources

from data_pipeline.tokenizer.tokenizer import Tokenizer

_SPECIALS = ("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
_STOPS = ("<|return|>", "<|call|>")


def has_harmony(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has the special tokens that conversations are written with."""
    return set(_SPECIALS) <= tokenizer.special_tokens.keys()


def chat_template() -> str:
    """Return the Jinja template that writes messages as Harmony."""
    return (resources.files("data_pipeline.tokenizer") / "harmony.jinja").read_text("utf-8")


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids at which generation ends: Harmony's if the tokenizer has it, and the end of a document."""
    if not has_harmony(tokenizer):
        return [tokenizer.eot_id]
    answer, call = (tokenizer.special_tokens[token] for token in _STOPS)
    return [answer, tokenizer.eot_id, call]  # in the order of the published models
