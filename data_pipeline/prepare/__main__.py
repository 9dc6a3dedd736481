"""Text into a prepared dataset: a directory of Megatron shards, a manifest and the tokenizer.

    python -m data_pipeline.prepare pystdlib --output data/pystdlib
    python -m data_pipeline.prepare corpus/*.jsonl.zst --output data/corpus --tokenizer o200k_harmony --workers 8
    python -m data_pipeline.prepare --config configs/data/tinystories.yaml --output data/tinystories

The directory appears whole or not at all; its bytes do not depend on the number of workers, nor on how often the
command was killed and given again.
"""

import argparse
import sys
from pathlib import Path

import yaml

from data_pipeline.corpora.sources import open_source
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tokenizer.published import load_tokenizer
from data_pipeline.tools import command


def main(argv: list[str] | None = None) -> int:
    return command.run(lambda: _prepare(_arguments(argv)), interrupted="interrupted; the same command continues")


def _prepare(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(
        arguments.tokenizer,
        pattern=arguments.pattern,
        vocab_file=arguments.vocab_file,
        vocab_size=arguments.vocab_size,
    )
    tokenizer.engine = arguments.engine
    sources = [
        open_source(
            spec,
            text_column=arguments.text_column,
            split=arguments.split,
            config_name=arguments.name,
            revision=arguments.revision,
        )
        for spec in arguments.sources
    ]
    prepare(
        sources,
        arguments.output,
        tokenizer,
        workers=arguments.workers,
        max_malformed=arguments.max_malformed,
        overwrite=arguments.overwrite,
        report=lambda line: print(line, flush=True),
        normalization=arguments.normalization,
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        filters=tuple(arguments.filter),
        deduplicate=not arguments.keep_duplicates,
        validation_fraction=arguments.validation_fraction,
        shard_tokens=arguments.shard_tokens,
        max_documents=arguments.max_documents,
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for a bad recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description="Tokenize text into a directory that training reads. A command that was interrupted or killed "
        "continues when it is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="pystdlib, installed, synthetic[:documents=N,seed=S]; files, globs or directories of .txt .md .jsonl "
        ".parquet (.gz .zst), also as s3://, gs:// or https:// URLs; or a Hugging Face dataset name",
    )
    add("--config", help="recipe: a YAML file of these options, such as configs/data/tinystories.yaml; options given "
        "here count more")  # fmt: skip
    add("--output", help="directory to create")
    add(
        "--tokenizer", default="builtin", help="builtin, bytes, o200k_harmony, o200k_base, cl100k_base, gpt2, or a path"
    )
    add("--pattern", help="word pattern of a tokenizer file that is not recognised")
    add("--vocab-file", help="rank file of an OpenAI tokenizer, instead of searching for it")
    add("--vocab-size", type=int, help="shorten the tokenizer to exactly this many ids")
    add("--engine", default="auto", choices=["auto", "tiktoken", "gigatoken"], help="what tokenizes; same ids")
    add("--text-column", default="text", help="field that holds the text in records")
    add("--split", help="split of a Hugging Face dataset (train when not given)")
    add("--name", help="configuration of a Hugging Face dataset")
    add("--revision", help="revision of a Hugging Face dataset")
    add("--normalization", choices=["NFC", "NFD", "NFKC", "NFKD"], help="Unicode normalization of the texts")
    add("--min-characters", type=int, default=0, help="drop shorter documents")
    add("--max-characters", type=int, help="drop longer documents")
    add("--filter", action="append", default=[], metavar="MODULE:FUNCTION",
        help="called with each text: True keeps it, False drops it, a text replaces it; may be repeated")  # fmt: skip
    add("--keep-duplicates", action="store_true", help="do not drop exact copies of earlier documents")
    add("--max-malformed", type=float, default=0.001, help="largest share of bad records; they are left out")
    add("--validation-fraction", type=float, default=0.01, help="share of the documents held out")
    add("--shard-tokens", type=int, default=1 << 26, help="most tokens of a shard file")
    add("--max-documents", type=int, help="stop after this many documents")
    add("--workers", type=int, default=1, help="processes")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    arguments = parser.parse_args(argv)
    if arguments.config:
        parser.set_defaults(**_recipe(Path(arguments.config), parser))
        arguments = parser.parse_args(argv)
    for name in ("sources", "output"):
        if not getattr(arguments, name):
            raise ValueError(f"{name}: missing; see python -m data_pipeline.prepare --help")
    return arguments


def _recipe(path: Path, parser: argparse.ArgumentParser) -> dict:
    """Values of a YAML file by the names of options. Raises ValueError naming file and key."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options, such as `tokenizer: builtin`")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    recipe = {}
    for key, value in values.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(actions))}")
        if action.nargs == "*" or isinstance(action.default, list):
            right = isinstance(value, list) and all(isinstance(item, str) for item in value)
            expected = "a list of texts"
        elif isinstance(action, argparse._StoreTrueAction):
            right, expected = isinstance(value, bool), "true or false"
        else:
            kinds = {int: int, float: (int, float), None: str}[action.type]
            right = isinstance(value, kinds) and not isinstance(value, bool)
            right = right and (action.choices is None or value in action.choices)
            right = right or (value is None and action.default is None)
            expected = f"one of {', '.join(action.choices)}" if action.choices else f"{action.type or str}"
        if not right:
            raise ValueError(f"{path}: {key}: {value!r} is not {expected}")
        recipe[action.dest] = value
    return recipe


if __name__ == "__main__":
    sys.exit(main())
