"""Values that make no sense are refused in one line with the key; what makes sense is read back as it was written."""

import dataclasses
import errno
import itertools
import math
import os
import subprocess
import sys
import typing

import pytest
import yaml

from data_pipeline.command_line import Program, check_ranges, parse, positional, run
from data_pipeline.command_line.mistakes import in_words, naming, one_line
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.tokenizer.rank_files import VocabularyOptions
from data_pipeline.tools.adopt import AdoptOptions
from data_pipeline.tools.inspect import InspectOptions
from data_pipeline.tools.merge import MergeOptions
from data_pipeline.tools.split import SplitOptions
from data_pipeline.tools.verify import VerifyOptions
from gptoss_dist.config import Config, ModelConfig, SourceConfig, build_parser, load_config, parse_arguments
from gptoss_dist.tracking.tracker import SyncOptions
from tests.config.wrong_values import of_command, of_training

QUICKSTART = ["--config", "configs/quickstart.yaml"]
COMMANDS = {
    PrepareConfig: ["text.txt", "--output", "x"],
    AdoptOptions: ["x", "--tokenizer", "bytes", "--train", "a"],
    InspectOptions: ["x"],
    SplitOptions: ["x", "--output", "y", "--parts", "1"],
    MergeOptions: ["x", "y", "--output", "z"],
    VerifyOptions: ["x"],
    VocabularyOptions: ["o200k_base"],
    SyncOptions: ["x"],
}
EVERY_NTH = 23
"""Which of the wrong command lines are tried here; all of them, some 2300, take minutes."""


def refused(*argv: str) -> str:
    with pytest.raises(ValueError) as error:
        parse_arguments([*QUICKSTART, *argv])
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 900
    return message


def floats() -> list[str]:
    hints = typing.get_type_hints(Config)
    sections = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    found = [
        f"{section}.{name}"
        for section, kind in sections.items()
        for name, hint in typing.get_type_hints(kind).items()
        if float in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not dict
    ]
    assert len(found) >= 15
    return found


def test_no_number_is_infinite_whatever_its_field():
    for key, number in itertools.product(floats(), (math.inf, -math.inf, math.nan)):
        config = Config(model=ModelConfig())
        section, name = key.split(".")
        several = isinstance(getattr(getattr(config, section), name), list) or name == "sink_clamp"
        setattr(getattr(config, section), name, [0.5, number] if several else number)
        with pytest.raises(ValueError, match=rf"^{key}={number} must be a finite number$"):
            config.check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "1e400"),
        ("optim.lr_scale", "{'*.router.*': .inf}"),
        ("engine.deepspeed", "{zero_optimization: {stage3_max_live_parameters: .inf}}"),
        ("run.seed", str(2**64)),
        ("data.seq_len", "1" + "0" * 400),
        ("model.rms_norm_eps", "-1e-5"),
        ("model.rope_theta", "0"),
        ("model.num_hidden_layers", "300000"),
        ("model.rope_scaling", "{factor: 0}"),
        ("model.rope_scaling", "{beta_slow: 40}"),
        ("train.micro_batch_size", "100000000"),
        ("parallel.replicate", "0"),
        ("parallel.expert_parallel", "-2"),
        ("sampling.max_new_tokens", "-5"),
        ("resume", ""),
        ("data.path", ""),
        ("checkpoint.dir", ""),
        ("run.dir", "a\0b"),
        ("data.path", "\udcff"),
        ("run.name", ""),
        ("run.name", " "),
        ("run.name", ".."),
        ("run.name", "/tmp/x"),
        ("run.name", "a/../../b"),
        ("run.name", "a//b"),
        ("run.name", "a\x1b[31m"),
        ("run.name", "a\nb"),
        ("run.name", "n" * 300),
        ("optim.lr_scale", "{a: -1}"),
        ("optim.lr_scale", "{1: 2}"),
        ("model.rope_scaling", "{factor: null}"),
        ("init.from", ""),
        ("init", "{from: a, other_tokenizer: 5}"),
        ("config", "{train: 5}"),
        ("config", "{run: {name: x}, init: null}"),
        ("data", "{path: null, sources: [{path: a, weight: 0}]}"),
        ("data", "{path: null, sources: [{path: a}, {path: b}], stages: [{from_step: 5, weights: {a: 0}}]}"),
        ("train", "5"),
        ("train", "null"),
    ],
)
def test_the_message_names_the_key(key, value):
    message = refused(f"--{key}={value}")
    assert key in message or (key == "config" and "is no section" in message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train.steps 20", "optim.warmup_steps=30 is more than train.steps=20"),
        ("--optim.decay_steps 50", "optim.decay_steps=50 has no meaning with optim.schedule=cosine"),
        (
            "--optim.schedule wsd --optim.decay_steps 490",
            "overlap in a run of train.steps=500; shorten",
        ),
        ("--train.compile_mode max-autotune", "has no meaning without --train.compile true"),
        ("--train.profile_step 501", "train.profile_step=501 is after the last step"),
        ("--checkpoint.keep_best true --validation.every 0", "checkpoint.keep_best=True goes by the validation loss"),
    ],
)
def test_settings_that_contradict_each_other(argv, message):
    assert message in refused(*argv.split())


def test_the_default_warm_up_fits_the_run():
    assert [
        load_config(overrides={"model.hidden_size": 64, "train.steps": steps}).optim.warmup(steps)
        for steps in (5, 20, 999, 1000, 50000)
    ] == [0, 2, 99, 100, 100]


@pytest.mark.parametrize("value", ["5", "null", "", "[1]", "true", ".inf"])
def test_a_section_is_not_a_value(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {{name: x}}\ntrain: {value}\n")
    message = refused("--config", str(path), "--train.precision", "bf16")
    assert message.startswith(f"{path}: train=") and "leave it out" in message


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--train.stesp", "5"], "--train.steps"),
        (["--optim.learning_rate", "5"], "--optim.lr"),
        (["--batch-size", "5"], "--train.micro_batch_size"),
        (["--data.packing", "bestfit"], "best_fit"),
        (["--optim.warmup-stpes=5"], "--optim.warmup_steps"),
        (["--dryrun"], "--dry-run"),
    ],
)
def test_what_was_meant(argv, meant):
    parser = build_parser()
    parser.add_argument("--dry-run", action="store_true")
    with pytest.raises(ValueError) as error:
        parse_arguments([*QUICKSTART, *argv], parser)
    assert str(error.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.steps", "x"], "train.steps=x must be a whole number"),
        (["--optim.lr", "abc"], "optim.lr=abc must be a number"),
        (["--train.compile", "5"], "train.compile=5 must be true or false"),
        (["--parallel.expert_parallel", "most"], "parallel.expert_parallel=most must be auto or a whole number"),
        (["--optim.betas", "x"], "optim.betas=x must be a list, as [1, 2]"),
        (["--train.precision", "fp8"], "train.precision=fp8 must be one of fp32, bf16"),
    ],
)
def test_a_wrong_type_is_told_in_plain_words(argv, message):
    assert refused(*QUICKSTART, *argv).startswith(message)


def test_what_was_meant_in_files_and_commands(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for text, meant in (("trainn: {steps: 5}", "train.steps"), ("train: {step: 5}", "train.steps")):
        path.write_text(text)
        assert refused("--config", str(path)).endswith(f"did you mean {meant}?")
    with pytest.raises(ValueError, match="did you mean --text-column"):
        parse(PrepareConfig, ["a", "--output", "o", "--text-colum", "x"], prog="p")


def test_files_in_other_encodings_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run: {name: '\xff'}")
    assert refused("--config", str(path)).startswith(f"{path}: is not UTF-8: byte 13 is 0xff")


TEXTS = [
    *(
        "-- x",
        "# x",
        "~",
        "1e5",
        "null",
        "yes",
        "5e-2",
        "é😀",
        " a ",
        '"',
        "'",
        "it's",
        "a: b",
        "[x]",
        "{a: 1}",
        "*x",
        "&x",
    ),
    *(
        "!x",
        "%x",
        "@x",
        "`x",
        "|",
        ">",
        "- x",
        "? x",
        "0x10",
        "0o7",
        "1_000",
        "12:30:00",
        "2020-01-01",
        ".inf",
        "on",
        "No",
    ),
    *("=", "<<", "a #b", "\\n", "..", "true", "-5", "a\nb", "\ta", "a\n", "\u2028", "\x85", "\ufeff", "x" * 200),
]


def test_what_a_run_writes_it_reads_back(tmp_path):
    """Every text stands in each kind of field; `null` in none that may have no value, for which it is the word."""
    names = [text for text in TEXTS if text.isprintable() and text.strip() and text != ".."]
    optional = [text for text in TEXTS if text != "null"]
    for start in range(0, len(TEXTS), 5):
        name, some = names[start % len(names)], [optional[(start + n) % len(optional)] for n in range(5)]
        config = Config(model=ModelConfig(rope_scaling=None))
        config.sampling.prompts = ["", *TEXTS]
        config.optim.lr_scale, config.optim.freeze = dict.fromkeys(TEXTS, 0.5), TEXTS
        config.engine.deepspeed = {"texts": TEXTS, "deep": {text: {"note": text} for text in TEXTS}}
        config.data.path, config.data.sources = (
            None,
            (SourceConfig(some[0], 5e-2, name="first"), SourceConfig("b", 0.5, name=name)),
        )
        config.run.name, config.tracking.experiment, config.run.dir, config.checkpoint.dir = name, name, *some[:2]
        config.tracking.uri, config.init = some[2], {"from": some[3], "other_tokenizer": True}
        config.save(tmp_path / "config.yaml")
        again = load_config(tmp_path / "config.yaml").to_dict()
        for section, values in (config.to_dict() | {"resume": None}).items():
            assert again[section] == values, (section, some)


def test_numbers_are_read_back(tmp_path):
    config = Config(model=ModelConfig())
    for lr in (5e-2, 1e-8, 4e-4, 1e16, 123456789.0, 5e-324, 0.1 + 0.2):
        config.optim.lr = lr
        config.save(tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml").optim.lr == lr


@pytest.mark.parametrize("text", ["5e-2", "5E-2", ".05", "0.05"])
def test_numbers_are_numbers_in_recipes_too(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"sources: [a]\noutput: o\nvalidation-fraction: {text}\n")
    assert parse(PrepareConfig, ["--config", str(path)], prog="p").validation_fraction == 0.05


def test_wrong_command_lines_of_training():
    parser = build_parser(prog="train.py")
    cases = [case for case in of_training() if case[1] != ["--model.rope_scaling=null"]]
    assert len(cases) > 1400
    for key, words in cases[::EVERY_NTH]:
        with pytest.raises(ValueError) as error:
            parse_arguments([*QUICKSTART, *words], parser)
            pytest.fail(f"{words} was accepted")
        message = str(error.value)
        assert key.split(".")[-1] in message and "\n" not in message and len(message) < 900, message


@pytest.mark.parametrize("kind", COMMANDS)
def test_wrong_command_lines_of_other_commands(kind, capsys):
    cases = list(of_command(kind))
    for key, words in cases[::EVERY_NTH]:
        argv = [*COMMANDS[kind], *words]
        code = run(Program("do"), kind, lambda options, argv=argv: pytest.fail(f"{argv} was accepted"), argv)
        err = capsys.readouterr().err
        assert code == 2 and err.count("\n") == 1 and len(err) < 900, err
        name = key.lstrip("-")
        assert name in err or name.replace("_", "-") in err or "did you mean" in err, (words, err)


@dataclasses.dataclass
class One:
    """Take one thing."""

    source: str = positional("SOURCE")
    """Its name."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), "a/b: no such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "source=s: no space left on device; free some space, or"),
        (PermissionError(errno.EACCES, "Permission denied", b"a"), "a: permission denied; change its permissions"),
        (MemoryError(), "source=s: not enough memory: an allocation failed; choose smaller sizes"),
        (
            RuntimeError("[enforce fail at x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "source=s: not enough memory: can't allocate memory: 9 bytes; choose smaller",
        ),
        (
            OverflowError("Overflow when unpacking long long"),
            "source=s: a number is too large: Overflow when unpacking",
        ),
        (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "x"), "source=s: it is not UTF-8 text: byte 0xff at position 2"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "x"), "source=s: 'é' cannot be written in ascii; set PYTHONUTF8=1"),
        (
            RuntimeError("Could not determine home directory."),
            "source=s: the home directory that is meant is not known",
        ),
        (RecursionError("maximum recursion depth exceeded"), "source=s: it is nested too deeply"),
        (ValueError("a\x1b[31m\nb"), "error: a\\x1b[31m b"),
    ],
)
def test_errors_of_the_system_are_a_line_with_what_they_are_about(capsys, error, message):
    def action(options):
        raise error

    assert run(Program("do"), One, action, ["s"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_an_error_of_the_program_keeps_its_traceback():
    def action(options):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        run(Program("do"), One, action, ["s"])


def test_naming_adds_what_an_error_does_not_know():
    with pytest.raises(ValueError, match=r"^f\.json: it is not UTF-8 text"), naming("f.json"):
        b"\xff".decode()
    with pytest.raises(ValueError, match=r"^f\.json: is a directory; give a file$"), naming("f.json"):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "f.json")
    assert len(one_line("x" * 10**6)) < 900 and "[...]" in one_line("x" * 10**6)
    assert in_words(ValueError()) == "ValueError"


def test_checks_go_into_what_is_inside():
    @dataclasses.dataclass
    class Whole:
        items: list = dataclasses.field(default_factory=list)
        values: dict = dataclasses.field(default_factory=dict)

    check_ranges(Whole([1, "a", None, True], {"a": "", "b": [1e30]}))
    for items, message in (
        ([math.inf], "items=inf"),
        ([[2**63]], "items=9223372036854775808"),
        ([""], "items is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            check_ranges(Whole(items))
    with pytest.raises(ValueError, match="values of a of b=nan"):
        check_ranges(Whole(values={"a": {"b": math.nan}}))


def test_yaml_of_a_run_is_still_plain(tmp_path):
    config = load_config("configs/quickstart.yaml")
    config.save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict() | {"resume": None}


@pytest.mark.parametrize("variables", [{}, {"PYTHONIOENCODING": "ascii"}])
def test_a_locale_without_utf8_is_no_obstacle(tmp_path, variables):
    path = tmp_path / "é.txt"
    path.write_text("ü", encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path; from data_pipeline.command_line.process import accept_any_text\n"
        "accept_any_text(restart=True); print(Path(sys.argv[1]).read_text(), sys.argv[1])"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, program, path], env=os.environ | ascii_only | variables, capture_output=True, check=True
    )
    assert done.stdout.decode() == (f"ü {path}\n" if not variables else f"\\xfc {tmp_path}/\\xe9.txt\n")
