"""Text into a prepared dataset: a directory of Megatron shards, a manifest and the tokenizer.

    python -m data_pipeline.prepare pystdlib --output data/pystdlib
    python -m data_pipeline.prepare corpus/*.jsonl.zst --output data/corpus --tokenizer o200k_harmony --workers 8
    python -m data_pipeline.prepare --config configs/data/tinystories.yaml --output data/tinystories

The directory appears whole or not at all; its bytes do not depend on the number of workers, nor on how often the
command was killed and given again.
"""

import sys
from collections.abc import Callable
from functools import partial

from data_pipeline.command_line import MISTAKE, Program, print_line, run
from data_pipeline.corpora.part import TextSource
from data_pipeline.corpora.sources import open_source
from data_pipeline.prepare.allowed_code import import_from_allowed
from data_pipeline.prepare.pipeline import prepare, prepare_range
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.tokenizer.published import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    """Prepare what the command line asks for; return the exit code."""
    interrupted = "interrupted; the same command continues"
    program = Program("python -m data_pipeline.prepare", failed=MISTAKE, interrupted=interrupted)
    return run(program, PrepareConfig, _prepare, argv)


def _prepare(settings: PrepareConfig) -> None:
    import_from_allowed(settings.filter, settings.allow_code)
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
            ids_column=settings.ids_column,
            split=settings.split,
            config_name=settings.name,
            revision=settings.revision,
        )
        for spec in settings.sources
    ]
    _check_used(settings, sources)
    if settings.range_and_count is None:
        work: Callable = partial(prepare, max_malformed=settings.max_malformed)
    else:
        index, count = settings.range_and_count
        work = partial(prepare_range, index=index, count=count)
    work(
        sources,
        settings.output,
        tokenizer,
        workers=settings.workers,
        executor=settings.executor,
        overwrite=settings.overwrite,
        report=print_line,
        normalization=settings.normalization,
        min_characters=settings.min_characters,
        max_characters=settings.max_characters,
        filters=tuple(settings.filter),
        deduplicate=not settings.keep_duplicates,
        validation_fraction=settings.validation_fraction,
        shard_tokens=settings.shard_tokens,
        max_documents=settings.max_documents,
    )


def _check_used(settings: PrepareConfig, sources: list[TextSource]) -> None:
    """Check that options about sources mean something for one of them.

    Raises:
        ValueError: One does not; the message names it.
    """
    given = {
        "text_column": settings.text_column != "text",
        "ids_column": settings.ids_column is not None,
        "split": settings.split is not None,
        "config_name": settings.name is not None,
        "revision": settings.revision is not None,
    }
    used = {name for source in sources for name in source.options}
    for name, is_given in given.items():
        if is_given and name not in used:
            option = "--name" if name == "config_name" else f"--{name.replace('_', '-')}"
            about = "records with columns" if "column" in name else "Hugging Face datasets"
            raise ValueError(f"{option}: is about {about}, and no source holds any; leave it out")
    if settings.ids_column is not None and (other := [s.spec for s in sources if "ids_column" not in s.options]):
        raise ValueError(f"--ids-column: source {other[0]!r} holds texts, not token ids; prepare it apart")


if __name__ == "__main__":
    sys.exit(main())
