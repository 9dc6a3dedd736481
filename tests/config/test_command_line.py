"""The command line that all commands share: what people type, files, mistakes, help, exit codes."""

import dataclasses
import io
import os
from dataclasses import dataclass
from typing import Literal

import pytest

from data_pipeline.command_line import Program, option, parse, positional, print_line, ranged, run, run_verb
from data_pipeline.prepare.settings import PrepareConfig
from gptoss_dist.config import ModelConfig, load_config, parse_arguments
from tests.support.ranks import ROOT


@dataclass
class Options:
    """Do something. It takes
    a while."""

    sources: list[str] = positional("SOURCE")
    """What to read."""
    output: str = option()
    """Where to write
    it."""
    filter: list[str] = option(default_factory=list)
    """May be repeated."""
    train: list[str] = option(default_factory=list, several=True, metavar="NAME")
    """Several at once."""
    from_file: str | None = option(None, spelling="--from")
    """A file."""
    kind: Literal["small", "large"] | None = None
    """How much."""
    share: float = ranged(0.5, at_least=0, at_most=1)
    """Of all, 50 % by default."""
    count: int = 3
    """How many."""
    overwrite: bool = False
    """Replace."""
    verify: bool = True
    """Compare."""


@dataclass
class One:
    """Take one thing."""

    name: Literal["a", "b"] = positional("NAME")
    """Its name."""


def read(*argv: str) -> dict:
    """What is not as it is by default."""
    found = parse(Options, [*argv], prog="do")
    default = Options(["x"], "y")
    values = dataclasses.asdict(found).items()
    return {name: value for name, value in values if value != getattr(default, name)}


AWKWARD = [
    "null",
    "1",
    "true",
    "[x]",
    "{a: 1}",
    "a: b",
    ' x \n"é',
    "{a",
    "~",
    "5e-2",
    "😀",
    "\udcff",
    "\x7f",
    "a=b",
    "-",
    "# x",
    "&x",
    "*x",
    "!x",
    "-- all rows",
    "--all rows=1",
]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("a b --output o", {"sources": ["a", "b"], "output": "o"}),
        ("--output o a b", {"sources": ["a", "b"], "output": "o"}),
        ("a --output=o b", {"sources": ["a", "b"], "output": "o"}),
        ("--output o -- a --b", {"sources": ["a", "--b"], "output": "o"}),
        ("--overwrite a --output o", {"sources": ["a"], "output": "o", "overwrite": True}),
        ("a --output o --overwrite --no-overwrite", {"sources": ["a"], "output": "o"}),
        ("a --output o --overwrite=true", {"sources": ["a"], "output": "o", "overwrite": True}),
        ("a --output o --no-verify", {"sources": ["a"], "output": "o", "verify": False}),
        ("--filter x a --filter y --output o", {"sources": ["a"], "output": "o", "filter": ["x", "y"]}),
        ("a --sources b --output o c", {"sources": ["b", "a", "c"], "output": "o"}),
        ("a --train u v --output o", {"sources": ["a"], "output": "o", "train": ["u", "v"]}),
        ("a --train u --train v w --output o", {"sources": ["a"], "output": "o", "train": ["u", "v", "w"]}),
        ("a --output o --from f --kind small", {"sources": ["a"], "output": "o", "from_file": "f", "kind": "small"}),
        ("a --output o --share 1 --count 7", {"sources": ["a"], "output": "o", "share": 1.0, "count": 7}),
        ("a --output o --share 0.1 --share 0.2", {"sources": ["a"], "output": "o", "share": 0.2}),
    ],
)
def test_what_people_type(argv, expected):
    assert read(*argv.split()) == expected


@pytest.mark.parametrize("text", AWKWARD)
def test_texts_are_taken_as_they_are(text):
    words = [text] if text != "-" else ["-", "-"]
    optional = {} if text == "null" else {"from_file": text}  # the word for None, as in files
    assert read(*words, "--output", text, "--filter", text, "--train", text, text, "--from", text) == {
        "sources": words,
        "output": text,
        "filter": [text],
        "train": [text, text],
        **optional,
    }


@pytest.mark.parametrize(
    ("argv", "key"), [(["", "--output", "o"], "sources"), (["a", "--output", ""], "output"), (["a", "--from="], "from")]
)
def test_an_empty_text_is_no_value(argv, key):
    with pytest.raises(ValueError, match=f"^{key}.* is empty"):
        parse(Options, [*(["--output", "o"] if key == "from" else []), *argv], prog="do")


def test_dashes_and_underscores_are_the_same(tmp_path, capsys):
    first = parse(PrepareConfig, ["a", "--output", "o", "--validation-fraction", "0.2", "--keep-duplicates"], prog="p")
    second = parse(PrepareConfig, ["a", "--output", "o", "--validation_fraction=0.2", "--keep_duplicates"], prog="p")
    assert first == second and first.validation_fraction == 0.2 and first.keep_duplicates
    model = ["--model.hidden-size", "64"]
    assert parse_arguments([*model, "--train.micro-batch-size", "3"])[0].train.micro_batch_size == 3
    for spelling in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit) as end:
            parse(PrepareConfig, ["a", "--output", "o", spelling], prog="p")
        assert end.value.code in (0, None) and "keep_duplicates: false" in capsys.readouterr().out


def test_files_and_what_comes_later(tmp_path, capsys):
    recipe, more = tmp_path / "recipe.yaml", tmp_path / "more.yaml"
    recipe.write_text("sources: [a, b]\noutput: o\nfilter: [x]\nfrom-file: f\noverwrite: true\nshare: 0.25\n")
    more.write_text("share: 0.75\nfilter: [y]\n")
    whole = {"sources": ["a", "b"], "output": "o", "filter": ["x"], "from_file": "f", "overwrite": True, "share": 0.25}
    assert read("--config", str(recipe)) == whole
    assert read(f"--config={recipe}", "--share", "0.1") == whole | {"share": 0.1}
    assert read("--share", "0.1", "--config", str(recipe)) == whole
    assert read("--config", str(recipe), "--config", str(more)) == whole | {"share": 0.75, "filter": ["y"]}
    assert read("--config", str(recipe), "c", "--filter", "z") == whole | {"sources": ["c"], "filter": ["x", "z"]}
    assert read("--config", str(recipe), "--no-overwrite")["sources"] == ["a", "b"]
    with pytest.raises(SystemExit):
        read("--config", str(recipe), "--filter", "a: b", "--print_config")
    more.write_text(printed := capsys.readouterr().out)
    assert read("--config", str(more)) == whole | {"filter": ["x", "a: b"]}, printed
    more.write_text("train: [f]\n")
    assert read("a", "--output", "o", "--train", "u", "--config", str(more))["train"] == ["f"]
    assert read("a", "--output", "o", "--train=u", "--config", str(more), "--train", "v", "w")["train"] == [*"uvw"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outputs: o", "'outputs' is not accepted"),
        ("count: many", "count=many must be a whole number"),
        ("overwrite: 3", "overwrite=3 must be true or false"),
        ("sources: x", "sources=x must be a list"),
        ("sources: [1]", "sources=1 must be text"),
        ("kind: huge", "kind=huge must be one of small, large or null"),
        ("a: [", "is not readable YAML"),
        ("[1]", "Unexpected config: [1]"),
    ],
)
def test_mistakes_in_files_name_file_and_key(tmp_path, text, message):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("count: 4\n")
    bad.write_text(text + "\n")
    with pytest.raises(ValueError) as error:
        read("--config", str(good), "--config", str(bad), "a", "--output", "o")
    found = str(error.value)
    assert found.startswith(str(bad)) and message in found and found.endswith("; see do --help"), found
    assert "\n" not in found


def test_mistakes_in_files_of_a_run_name_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    for text, message in (("train: {stepz: 3}", "'stepz'"), ("train: {steps: many}", "train.steps=many must be")):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            parse_arguments(["--config", "configs/quickstart.yaml", "--config", str(path)])
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "arguments are required: SOURCE [SOURCE ...], --output OUTPUT"),
        ("a", "arguments are required: --output OUTPUT"),
        ("a --output", "argument --output: expected one argument"),
        ("a --output --count 3", "argument --output: expected one argument"),
        ("a --output o --counts 3", "unrecognized arguments: --counts"),
        ("a --output o --no-count", "unrecognized arguments: --no-count"),
        ("a --output o --count x", "count=x must be a whole number"),
        ("a --output o --overwrite=perhaps", "overwrite=perhaps must be true or false"),
        ("a --output o --kind huge", "kind=huge must be one of small, large or null"),
        ("a --output o --share 1.5", "share=1.5 must be in [0, 1]"),
        ("a --output o --config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, message):
    code = run(Program("do"), Options, lambda options: pytest.fail("was called"), argv.split())
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_one_word_where_one_is_expected(capsys):
    assert parse(One, ["b"], prog="do").name == "b"
    for argv, message in (
        (["c"], "name=c must be one of a, b"),
        (["a", "b"], "unrecognized arguments: b"),
        ([], r"required: \{a"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(One, argv, prog="do")


def test_the_help_shows_options_as_they_are_typed(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Options, ["--help"], prog="do", epilog="The end.")
    assert end.value.code in (0, None)
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(
        "usage: do SOURCE [SOURCE ...] --output OUTPUT [further options below] Do something. It takes"
    )
    for part in (
        "SOURCE [SOURCE ...] What to read. (required, type: list[str])",
        "--output OUTPUT Where to write it. (required, type: str)",
        "--filter FILTER May be repeated.",
        "--train [NAME ...] Several at once.",
        "--from FROM_FILE A file.",
        "--kind {small,large} How much.",
        "--share SHARE Of all, 50 % by default. (in [0, 1]) (type: float, default: 0.5)",
        "--overwrite, --no-overwrite Replace.",
        "The end.",
    ):
        assert part in text, part
    assert "--sources" not in text and "+" not in text


def test_exit_codes(capsys):
    def do(error):
        def action(options):
            if error is not None:
                raise error

        return run(Program("do", interrupted="do it again"), One, action, ["a"])

    assert do(None) == 0
    assert do(ValueError("bad")) == 1 and capsys.readouterr().err == "error: bad\n"
    assert do(OSError("gone")) == 1 and capsys.readouterr().err == "error: gone\n"
    assert do(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "do it again\n"
    assert run(Program("do"), One, lambda options: 7, ["a"]) == 7

    def refuse(options):
        raise ValueError("no")

    assert run(Program("do", prefix="do.py", failed=2), One, refuse, ["a"]) == 2
    assert capsys.readouterr().err == "do.py: no\n"


def test_verbs(capsys):
    done = []
    verbs = {"one": (One, lambda options: done.append(options.name)), "other": (Options, lambda options: 3)}

    def do(*argv):
        return run_verb(Program("do"), verbs, [*argv], description="Two things.")

    assert do("one", "b") == 0 and done == ["b"]
    assert do("other", "x", "--output", "o") == 3
    assert do("one") == 2 and "see do one --help" in capsys.readouterr().err
    for argv in ((), ("two",), ("--one",)):
        assert do(*argv) == 2 and "give one of one, other" in capsys.readouterr().err
    assert do("--help") == 0
    out = capsys.readouterr().out
    assert "Two things." in out and "one    Take one thing." in out and "other  Do something. It takes" in out


@pytest.mark.parametrize("option", ["--deepspeed_config", "--deepspeed-config=zero.json", "--deepspeed"])
def test_deepspeeds_own_option_points_to_ours(option):
    with pytest.raises(ValueError, match=r"here it is --engine.deepspeed FILE"):
        parse_arguments(["--config", "configs/quickstart.yaml", option, "zero.json"])


def test_a_printed_line_is_safe_for_terminals_and_fits_their_encoding():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    print_line("\xdf\n\x1b[31m \udc80", stream)
    stream.seek(0)
    assert stream.read() == "\\xdf\n\\x1b[31m \\udc80\n"
    with pytest.raises(ValueError, match="--filter: may stand on the command line only"):
        parse(Typed, ["--config", '{"filter": ["x"]}', "--filter", "x"], prog="do")
    assert parse(Typed, ["--filter", "x", "--filter=null"], prog="do").filter == ["x", "null"]


@dataclass
class Typed:
    """Do something."""

    filter: list[str] = option(default_factory=list, typed_only=True)
    """Only on the command line."""


def test_a_second_model_is_that_model_and_no_mixture_of_both(tmp_path):
    """configs/pretrain_502m_a100.yaml names a model that is tied, with silu and without biases."""
    file, base = ROOT / "configs/model/gptoss_20b.yaml", ROOT / "configs/pretrain_502m_a100.yaml"
    assert load_config(base).model.tie_word_embeddings
    expected = ModelConfig.from_yaml(file)
    other = tmp_path / "other.yaml"
    other.write_text(f"model: {os.path.relpath(file, tmp_path)}\n")
    assert load_config(base, overrides={"model": file}).model == expected
    assert load_config(base, other).model == expected
    assert load_config(other, base).model == load_config(base).model
    later = load_config(base, overrides={"model.hidden_size": 1024, "model": file, "model.num_local_experts": 16}).model
    assert later == dataclasses.replace(expected, num_local_experts=16)
