"""Whether a model and its data speak of the same tokens: the tokenizer beside a model against another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.foreign import convert, parse_json, read_text
from data_pipeline.tokenizer.huggingface import spelled
from data_pipeline.tokenizer.rank_files import MOST_RANK_BYTES
from data_pipeline.tokenizer.tokenizer import FILE_NAME, Tokenizer


class _Model(msgspec.Struct):
    vocab: dict[str, Any] | list[Any]


class _File(msgspec.Struct):
    """The part of tokenizer.json that says which text has which id."""

    model: _Model


def difference(folder: str | Path, tokenizer: Tokenizer) -> str | None:
    """Return in words how the tokenizer in a model's folder differs from another one.

    Args:
        folder: Of a checkpoint, or of a model in the layout of transformers.
        tokenizer: What it is compared with.

    Returns:
        The words, which are empty if the ids of text are the same, or None if the folder has no tokenizer.

    Raises:
        ValueError: Its file cannot be read.
    """
    ours, theirs = Path(folder) / FILE_NAME, Path(folder) / "tokenizer.json"
    if ours.is_file():
        found = Tokenizer.load(folder)
        alike = found.sha256 == tokenizer.sha256
        return "" if alike else f"it was trained with tokenizer {found.name} ({found.n_vocab} ids)"
    if not theirs.is_file():
        return None
    values = parse_json(read_text(theirs, most=MOST_RANK_BYTES), theirs)
    try:
        vocabulary = dict(convert(values, _File, theirs).model.vocab)
    except (TypeError, ValueError):
        return None  # a model of another kind, whose ids are no ranks
    expected = spelled(tokenizer.ranks)
    other = sum(vocabulary.get(text) != tokenizer.ranks[token] for token, text in expected.items())
    extra = len(vocabulary.keys() - set(expected.values()) - set(tokenizer.special_tokens))
    if not other and not extra:
        return ""
    return f"{other} of {len(expected)} tokens have other ids in {theirs.name}, and {extra} tokens are there only"
