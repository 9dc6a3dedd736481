"""Options of `python -m data_pipeline.prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.command_line import option, positional, ranged


@dataclass
class PrepareConfig:
    """Tokenize text into a directory that training reads.

    A command that was interrupted or killed continues when it is given again.
    """

    sources: list[str] = positional("SOURCE")
    """pystdlib, installed, synthetic[:documents=N,seed=S]; files, globs or directories of .txt .md .jsonl .parquet (.gz
    .zst), also as s3://, gs:// or https:// URLs; or the name of a Hugging Face dataset."""
    output: str = option()
    """Directory to create."""
    tokenizer: str = "builtin"
    """builtin, bytes, o200k_harmony, o200k_base, cl100k_base, gpt2, or a path."""
    pattern: str | None = None
    """Word pattern of a tokenizer file that is not recognised."""
    vocab_file: str | None = None
    """Rank file of an OpenAI tokenizer, instead of searching for it."""
    vocab_size: int | None = ranged(None, at_least=257)
    """Shorten the tokenizer to exactly this many ids."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """What tokenizes; the ids are the same."""
    text_column: str = "text"
    """Field that holds the text in records."""
    split: str | None = None
    """Split of a Hugging Face dataset; null is train."""
    name: str | None = None
    """Configuration of a Hugging Face dataset."""
    revision: str | None = None
    """Revision of a Hugging Face dataset."""
    normalization: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """Unicode normalization of the texts."""
    min_characters: int = ranged(0, at_least=0)
    """Drop shorter documents."""
    max_characters: int | None = ranged(None, at_least=1)
    """Drop longer documents."""
    filter: list[str] = option(default_factory=list, metavar="MODULE:FUNCTION")
    """Called with each text: True keeps it, False drops it, a text replaces it. May be repeated; those of a recipe come
    first."""
    keep_duplicates: bool = False
    """Do not drop exact copies of earlier documents."""
    max_malformed: float = ranged(0.001, at_least=0, at_most=1)
    """Largest share of bad records; they are left out."""
    validation_fraction: float = ranged(0.01, at_least=0, below=1)
    """Share of the documents held out."""
    shard_tokens: int = ranged(1 << 26, at_least=1)
    """Most tokens of a shard file."""
    max_documents: int | None = ranged(None, at_least=1)
    """Stop after this many documents."""
    workers: int = ranged(1, at_least=1)
    """Processes."""
    overwrite: bool = False
    """Replace an existing dataset."""
