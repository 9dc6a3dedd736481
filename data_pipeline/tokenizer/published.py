"""Tokenizers by name, from a rank file or from a folder: the published vocabularies and their special tokens."""

import hashlib
from importlib import resources
from pathlib import Path

from data_pipeline.foreign import read_bytes
from data_pipeline.tokenizer.patterns import PATTERNS
from data_pipeline.tokenizer.rank_files import MOST_RANK_BYTES, SHA256, find_ranks, parse_ranks
from data_pipeline.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

HARMONY_SPECIALS = (
    "<|startoftext|>",
    END_OF_TEXT,
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
_LLAMA3_RANKS = 128_000


def load_tokenizer(
    name_or_path: str | Path,
    *,
    pattern: str | None = None,
    vocab_file: str | Path | None = None,
    vocab_size: int | None = None,
    download: bool = True,
) -> Tokenizer:
    """Return a tokenizer by name, from a directory it was saved in, or from a tiktoken rank file.

    Args:
        name_or_path: A name, which is `builtin` (4,096 byte pairs trained on Python's standard library, and the Harmony
            specials), `bytes`, `o200k_harmony` (gpt-oss), `o200k_base`, `cl100k_base` or `gpt2`; a directory written by
            `Tokenizer.save`; or a rank file such as LLaMA-3's `tokenizer.model` (recognised by its 128,000 ranks: its
            pattern and its 256 special tokens are known, n_vocab 128,256).
        pattern: For another rank file, a regular expression or one of PATTERNS; its special tokens are then Harmony's,
            after the last rank.
        vocab_file: Where the published rank file of an OpenAI name is, instead of searching; see
            `rank_files.find_ranks`.
        vocab_size: Leave out the last merges so that n_vocab, special tokens included, is exactly this. Most ids stay
            what they are; the special tokens move.
        download: Whether a published vocabulary that is nowhere on this machine may be downloaded.

    Raises:
        ValueError: The name is unknown, or the vocabulary cannot be found or read. The message has the remedy.
    """
    name = str(name_or_path)
    if vocab_file is not None and name not in _PUBLISHED:
        raise ValueError(f"vocab_file {vocab_file}: is one of {', '.join(_PUBLISHED)}, not of {name!r}; leave it out")
    if pattern is not None and (name in (*_PUBLISHED, "bytes", "builtin") or Path(name).is_dir()):
        raise ValueError(f"pattern {pattern!r}: is for rank files, and {name!r} has its own; leave it out")
    if name in _PUBLISHED:
        ranks_name, pattern_name, eot_token, special_tokens = _PUBLISHED[name]
        ranks = parse_ranks(find_ranks(ranks_name, vocab_file=vocab_file, download=download), ranks_name)
        tokenizer = Tokenizer(name, ranks, PATTERNS[pattern_name], special_tokens, eot_token)
    elif name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        tokenizer = Tokenizer(name, ranks, PATTERNS["bytes"], _after(ranks, HARMONY_SPECIALS))
    elif name == "builtin":
        data = (resources.files("data_pipeline.tokenizer") / "builtin.tiktoken").read_bytes()
        ranks = parse_ranks(data, "builtin.tiktoken")
        tokenizer = Tokenizer(name, ranks, PATTERNS["o200k"], _after(ranks, HARMONY_SPECIALS))
    elif Path(name).is_dir():
        tokenizer = Tokenizer.load(name)
    elif Path(name).is_file():
        tokenizer = _from_rank_file(Path(name), pattern)
    else:
        known = ", ".join(["builtin", "bytes", *_PUBLISHED])
        raise ValueError(f"tokenizer {name!r} is neither a known name ({known}) nor a file or directory")
    return tokenizer if vocab_size is None else _shortened(tokenizer, vocab_size)


def _from_rank_file(path: Path, pattern: str | None) -> Tokenizer:
    data = read_bytes(path, most=MOST_RANK_BYTES)
    ranks = parse_ranks(data, str(path))
    published = {digest: name for name, digest in SHA256.items()}.get(hashlib.sha256(data).hexdigest())
    if pattern is None and published:
        return load_tokenizer("gpt2" if published == "r50k_base" else published, vocab_file=path)
    if len(ranks) == _LLAMA3_RANKS:
        name = pattern or "llama3"
        return Tokenizer(
            path.name, ranks, PATTERNS.get(name, name), _after(ranks, _llama3_specials()), "<|end_of_text|>"
        )
    if pattern is None:
        raise ValueError(
            f"{path}: the pattern of this vocabulary of {len(ranks)} ranks is not known; give --pattern, one of "
            f"{', '.join(PATTERNS)} or a regular expression"
        )
    return Tokenizer(path.name, ranks, PATTERNS.get(pattern, pattern), _after(ranks, HARMONY_SPECIALS))


def _shortened(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    keep = vocab_size - len(tokenizer.special_tokens)
    if keep < 256 or vocab_size > tokenizer.n_vocab:
        raise ValueError(
            f"vocab_size {vocab_size}: tokenizer {tokenizer.name} can have {256 + len(tokenizer.special_tokens)} to "
            f"{tokenizer.n_vocab} ids"
        )
    ranks = {token: rank for token, rank in tokenizer.ranks.items() if rank < keep}
    specials = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    special_tokens = {token: keep + i for i, token in enumerate(specials)}
    return Tokenizer(f"{tokenizer.name}-{vocab_size}", ranks, tokenizer.pattern, special_tokens, tokenizer.eot_token)


def _after(ranks: dict[bytes, int], specials: tuple[str, ...]) -> dict[str, int]:
    return {token: i for i, token in enumerate(specials, max(ranks.values()) + 1)}


def _llama3_specials() -> tuple[str, ...]:
    """Return Meta's 256 special tokens (LLaMA-3.1 renames some of the reserved ones).

    A document ends with `<|end_of_text|>`; `<|eot_id|>` ends a chat turn.
    """
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    header = ("<|start_header_id|>", "<|end_header_id|>")
    return ("<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], *header, reserved[4], "<|eot_id|>", *reserved[5:])


def _harmony_specials() -> dict[str, int]:
    named = {
        "<|startoftext|>": 199998,
        END_OF_TEXT: 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
        "<|endofprompt|>": 200018,
    }
    taken = set(named.values())
    return named | {f"<|reserved_{i}|>": i for i in range(200_000, 201_088) if i not in taken}


_FIM_SPECIALS = {
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


# name: published ranks, pattern, token that ends a document, special tokens; from tiktoken's openai_public.py
_PUBLISHED = {
    "o200k_harmony": ("o200k_base", "o200k", END_OF_TEXT, _harmony_specials()),
    "o200k_base": ("o200k_base", "o200k", END_OF_TEXT, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "cl100k_base": ("cl100k_base", "cl100k", END_OF_TEXT, {END_OF_TEXT: 100257} | _FIM_SPECIALS),
    "gpt2": ("r50k_base", "gpt2", END_OF_TEXT, {END_OF_TEXT: 50256}),
}
