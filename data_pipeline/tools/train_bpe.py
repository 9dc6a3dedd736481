"""Train a byte-pair vocabulary; the result is deterministic, and the built-in one takes a few seconds.

python -m data_pipeline.bpe FILES --vocab-size 8192 --output my.tiktoken
python -m data_pipeline.bpe --output data_pipeline/tokenizer/builtin.tiktoken    # how the built-in one was made
"""

import heapq
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex

from data_pipeline.command_line import MISTAKE, Program, option, positional, print_line, ranged, run
from data_pipeline.corpora.sources import open_source
from data_pipeline.disk import write_file_atomically
from data_pipeline.shards.output import local_output
from data_pipeline.tokenizer.patterns import PATTERNS
from data_pipeline.tokenizer.rank_files import format_ranks
from data_pipeline.tokenizer.tokenizer import END_OF_TEXT, Tokenizer


def train(documents: Iterable[str], vocab_size: int, pattern: str = PATTERNS["o200k"]) -> dict[bytes, int]:
    """Merge the most frequent adjacent pair until there are `vocab_size` tokens or no pair is left.

    This is Sennrich et al. 2016 on bytes, inside the words that `pattern` cuts. Among equally frequent pairs the one
    with the smallest bytes wins, so the result depends on nothing but the arguments.

    Args:
        documents: The texts.
        vocab_size: The number of ranks, at least 256.
        pattern: The regular expression that cuts texts into words.

    Returns:
        The rank of each token, by its bytes.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size}: a byte-level vocabulary has at least 256 tokens")
    word_counts = _count_words(documents, pattern)
    words = [list(word.encode("utf-8", "replace")) for word in word_counts]
    counts = list(word_counts.values())

    tokens = [bytes([byte]) for byte in range(256)]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    pair_counts: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)

    def entry(pair: tuple[int, int]):
        return -pair_counts[pair], tokens[pair[0]], tokens[pair[1]], pair

    queue = [entry(pair) for pair in pair_counts]
    heapq.heapify(queue)
    while len(tokens) < vocab_size and queue:
        negative_count, _, _, pair = heapq.heappop(queue)
        if pair_counts[pair] != -negative_count:
            continue  # stale: the pair has been seen since with another count, and queued again if it has one
        merged = tokens[pair[0]] + tokens[pair[1]]
        # tiktoken looks merges up by their bytes, so two ways to spell the same bytes are one token.
        rank = rank_of.setdefault(merged, len(tokens))
        if rank == len(tokens):
            tokens.append(merged)
        change: Counter[tuple[int, int]] = Counter()
        for index in words_with.pop(pair):
            old = words[index]
            new = _merge(old, pair, rank)
            for before in pairwise(old):
                change[before] -= counts[index]
            for after in pairwise(new):
                change[after] += counts[index]
                words_with[after].add(index)
            words[index] = new
        for changed, difference in change.items():
            if difference:
                pair_counts[changed] += difference
                if pair_counts[changed] > 0:
                    heapq.heappush(queue, entry(changed))
    return rank_of


def _count_words(documents: Iterable[str], pattern: str) -> Counter[str]:
    cut = regex.compile(pattern)
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(match.group() for match in cut.finditer(document))  # findall would give the groups of a pattern
    return counts


def _merge(word: list[int], pair: tuple[int, int], rank: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(rank)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


@dataclass
class TrainBpeOptions:
    """Train a byte-pair vocabulary."""

    output: str = option()
    """Rank file to write."""
    sources: list[str] = positional("SOURCE", default_factory=lambda: ["pystdlib"])
    """Texts, as for prepare."""
    vocab_size: int = ranged(4096, at_least=256)
    """Ranks, without special tokens."""
    pattern: str = "o200k"
    """One of o200k, cl100k, llama3, gpt2, bytes, or a regular expression."""
    text_column: str = "text"
    """Field that holds the text in records."""


def main(argv: list[str] | None = None) -> int:
    """Train the vocabulary that the command line describes; return the exit code."""
    return run(Program("python -m data_pipeline.bpe", failed=MISTAKE), TrainBpeOptions, _train, argv)


def _train(options: TrainBpeOptions) -> None:
    output = _output_file(options.output)
    pattern = PATTERNS.get(options.pattern, options.pattern)
    _check_pattern(pattern, output.name)
    sources = [open_source(spec, text_column=options.text_column) for spec in options.sources]
    for source in sources:
        if source.left_out:
            print_line(f"{source.spec}: left out: {source.left_out}")
    documents = (text for source in sources for text in source.documents())
    ranks = train(documents, options.vocab_size, pattern)
    write_file_atomically(output, format_ranks(ranks))
    print_line(f"{output}: {len(ranks)} ranks from {', '.join(source.description for source in sources)}")
    if len(ranks) < options.vocab_size:
        print_line(f"  fewer than the {options.vocab_size} that were asked for: no pair is left to merge")
    words = ["--tokenizer", str(output), "--pattern", options.pattern]
    print_line(f"prepare data with it: python -m data_pipeline.prepare SOURCE --output DIR {shlex.join(words)}")


def _output_file(output: str) -> Path:
    """Return the path of the file of ranks that is going to be written.

    Raises:
        ValueError: It is a URL, or is there and no file, or its folder cannot be written.
    """
    path = local_output(output)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file; name the file of ranks to write, such as ranks.tiktoken")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"{path}: cannot be written, as {folder} is no folder that this user may write; choose another"
        )
    return path


def _check_pattern(pattern: str, name: str) -> None:
    """Refuse what no tokenizer could use, before anything is trained with it.

    Args:
        pattern: The regular expression.
        name: What the tokenizer will be called.

    Raises:
        ValueError: It is none for both engines, matches the empty text, or leaves out some characters.
    """
    remedy = (
        f"give --pattern one of {', '.join(PATTERNS)}, or a regular expression that matches every character, such as "
        f"one that ends with |(?s:.)"
    )
    try:
        if regex.compile(pattern).fullmatch("") is not None:  # of which tiktoken makes no error, but a crash
            raise ValueError(f"pattern {pattern!r}: matches the empty text, which is no word")
        Tokenizer(name, {bytes([byte]): byte for byte in range(256)}, pattern, {END_OF_TEXT: 256})
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r}: {error}; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
