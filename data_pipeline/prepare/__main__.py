"""Text into a prepared dataset: a directory of Megatron shards, a manifest and the tokenizer.

    python -m data_pipeline.prepare pystdlib --output data/pystdlib
    python -m data_pipeline.prepare corpus/*.jsonl.zst --output data/corpus --tokenizer o200k_harmony --workers 8
    python -m data_pipeline.prepare --config configs/data/tinystories.yaml --output data/tinystories

The directory appears whole or not at all; its bytes do not depend on the number of workers, nor on how often the
command was killed and given again.
"""

import sys

from data_pipeline.command_line import Program, run
from data_pipeline.corpora.sources import open_source
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.tokenizer.published import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Prepare what the command line asks for; return the exit code."""
    program = Program("python -m data_pipeline.prepare", interrupted="interrupted; the same command continues")
    return run(program, PrepareConfig, _prepare, argv)


def _prepare(settings: PrepareConfig) -> None:
    tokenizer = load_tokenizer(
        settings.tokenizer,
        pattern=settings.pattern,
        vocab_file=settings.vocab_file,
        vocab_size=settings.vocab_size,
    )
    tokenizer.engine = settings.engine
    sources = [
        open_source(
            spec,
            text_column=settings.text_column,
            split=settings.split,
            config_name=settings.name,
            revision=settings.revision,
        )
        for spec in settings.sources
    ]
    prepare(
        sources,
        settings.output,
        tokenizer,
        workers=settings.workers,
        max_malformed=settings.max_malformed,
        overwrite=settings.overwrite,
        report=lambda line: print(line, flush=True),
        normalization=settings.normalization,
        min_characters=settings.min_characters,
        max_characters=settings.max_characters,
        filters=tuple(settings.filter),
        deduplicate=not settings.keep_duplicates,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        max_documents=settings.max_documents,
    )


if __name__ == "__main__":
    sys.exit(main())
