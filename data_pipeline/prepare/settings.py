"""Options of `python -m data_pipeline.prepare`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from data_pipeline.command_line import option, positional, ranged


@dataclass
class PrepareConfig:
    """Tokenize text into a directory that training reads.

    A command that was interrupted or killed continues when it is given again.
    """

    sources: list[str] = positional("SOURCE")
    """pystdlib, installed, synthetic[:documents=N,seed=S], needles[:task=T,documents=N,least=WORDS,most=WORDS,seed=S];
    files, patterns or folders of .txt .md .jsonl .ndjson .json .parquet .arrow (.gz .zst .xz .bz2), also as s3://,
    gs:// or https:// URLs; a folder of save_to_disk; or the name of a Hugging Face dataset."""
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
    ids_column: str | None = None
    """Field that holds lists of token ids that the tokenizer made, to take instead of texts."""
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
    first. Only from files that --allow-code names."""
    allow_code: list[str] = option(default_factory=list, metavar="PATH", typed_only=True)
    """Python file, or folder of such files, from which filters may be run. Only on the command line, never in a recipe;
    may be repeated."""
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
    executor: Literal["processes", "ray"] = "processes"
    """What runs the workers: processes of this machine, or Ray on the machines of a cluster (RAY_ADDRESS)."""
    workers: int | None = ranged(None, at_least=1, at_most=1024)
    """Processes; null is 1, and with Ray as many as its machines have processors."""
    part_range: str | None = option(None, metavar="I/N")
    """Prepare only range I of N of the parts, from 0/N to N-1/N, beside other such commands on machines that share the
    folder of --output; when all have ended, the same command without this makes the dataset."""
    overwrite: bool = False
    """Replace a dataset that this command made."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: there are none; name what to prepare, such as pystdlib or corpus.jsonl")
        if self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(
                f"--min-characters {self.min_characters}: must not be more than --max-characters, which is "
                f"{self.max_characters}"
            )
        _ = self.range_and_count
        if self.allow_code and not self.filter:
            raise ValueError("--allow-code: means nothing without --filter MODULE:FUNCTION; leave it out")
        if self.ids_column is None:
            return
        rules = {
            "--text-column": self.text_column != "text",
            "--normalization": self.normalization is not None,
            "--min-characters": self.min_characters > 0,
            "--max-characters": self.max_characters is not None,
            "--filter": bool(self.filter),
        }
        if given := [name for name, is_given in rules.items() if is_given]:
            raise ValueError(f"{given[0]}: is about texts, and --ids-column reads token ids; give one of them")

    @property
    def range_and_count(self) -> tuple[int, int] | None:
        """The number of the range, and how many there are, if `part_range` is given.

        Raises:
            ValueError: It is none.
        """
        if self.part_range is None:
            return None
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part_range)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"--part-range {self.part_range}: must be I/N with I from 0 to N-1, such as 0/3, 1/3 and 2/3"
            )
        return int(found[1]), int(found[2])
