"""A tokenizer in the files that Hugging Face's libraries read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from data_pipeline.tokenizer.harmony import stop_ids
from data_pipeline.tokenizer.tokenizer import Tokenizer


def huggingface_files(tokenizer: Tokenizer, max_length: int) -> dict[str, dict]:
    """Return the contents of tokenizer.json, tokenizer_config.json and generation_config.json by file name.

    tokenizer.json is for the `tokenizers` library: byte-level BPE with the same pattern, ranks as ids, and merges found
    by splitting each token as the ranks below its own would. Like tiktoken it takes a word that is a token as it is.
    Unlike `Tokenizer.encode`, it turns text that looks like a special token into that token, as is usual there.

    Args:
        tokenizer: The tokenizer.
        max_length: Positions of the model, for `model_max_length`.
    """
    end, stops = tokenizer.eot_token, stop_ids(tokenizer)
    return {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            "pad_token_id": tokenizer.eot_id,
        },
    }


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Return what the `tokenizers` library reads: special tokens, how text is cut, and the merges."""
    ranks = tokenizer.ranks
    texts = spelled(ranks)
    merges = [
        [texts[part] for part in _parts(ranks, token)]
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
    ]
    added = [
        {
            "id": id_,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, id_ in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # In Oniguruma's words: a dot that matches line breaks; and a counted repetition has no possessive form there.
    pattern = tokenizer.pattern.replace("(?s:", "(?m:").replace("{1,3}+", "{1,3}")
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {texts[token]: rank for token, rank in ranks.items()},
        "merges": [pair for pair in merges if len(pair) == 2],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def spelled(tokens: Iterable[bytes]) -> dict[bytes, str]:
    """Return the text that stands for each token in tokenizer.json."""
    letters = _letters()
    return {token: "".join(letters[byte] for byte in token) for token in tokens}


def _letters() -> list[str]:
    """Return the printable character that stands for each byte, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _parts(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """Return what byte pairs of lower rank make of `token`: the two parts whose merge it is."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while True:
        pairs = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, index = min(pairs, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
