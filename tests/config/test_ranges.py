"""Ranges beside the fields: every one is enforced, with the field's key in the message, and stands in the help."""

import math
import operator
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from data_pipeline.command_line import Range, check_ranges, parse, ranged, ranges_of
from data_pipeline.command_line.options import options_of
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.tools.adopt import AdoptOptions
from data_pipeline.tools.inspect import InspectOptions
from data_pipeline.tools.split import SplitOptions
from data_pipeline.tools.verify import VerifyOptions
from gptoss_dist.config import Config, ModelConfig, build_parser, load_config

RANGES = dict(ranges_of(Config))
COMMANDS = {
    PrepareConfig: ["text.txt", "--output", "x"],
    AdoptOptions: ["x", "--tokenizer", "bytes", "--train", "a"],
    InspectOptions: ["x"],
    SplitOptions: ["x", "--output", "y"],
    VerifyOptions: ["x"],
}


def outside(limits: Range) -> Iterator[float]:
    """Values that are just outside of a range."""
    if limits.above is not None:
        yield limits.above
    if limits.at_least is not None:
        yield limits.at_least - 1
    if limits.at_most is not None:
        yield limits.at_most + 1
    if limits.below is not None:
        yield limits.below
    yield math.nan


def test_there_are_ranges_in_every_part_of_the_tree():
    sections = {key.split(".")[0] for key in RANGES}
    assert sections >= {"model", "data", "train", "optim", "loss", "checkpoint", "validation", "sampling", "tracking"}
    assert len(RANGES) >= 40


@pytest.mark.parametrize("key", RANGES)
def test_a_value_outside_is_refused_by_its_key(key):
    limits = RANGES[key]
    section, name = key.split(".")
    for number in outside(limits):
        config = Config(model=ModelConfig())
        setattr(getattr(config, section), name, number if limits.length is None else [number] * limits.length)
        with pytest.raises(ValueError) as error:
            config.check()
        assert str(error.value).startswith(f"{key}=") and " must be " in str(error.value)


def test_construction_and_the_command_line_refuse_too():
    with pytest.raises(ValueError, match=r"^model\.hidden_size=0 must be positive$"):
        ModelConfig(hidden_size=0)
    with pytest.raises(ValueError, match=r"^optim\.betas=\[0\.9, 1\.0\] must be two numbers in \[0, 1\)$"):
        load_config("configs/quickstart.yaml", overrides={"optim.betas": "[0.9, 1]"})
    with pytest.raises(ValueError, match=r"^optim\.betas=\[0\.9\] must be two numbers in \[0, 1\)$"):
        load_config("configs/quickstart.yaml", overrides={"optim.betas": "[0.9]"})
    with pytest.raises(ValueError, match=r"^train\.steps=0 must be positive$"):
        load_config("configs/quickstart.yaml", overrides={"train.steps": 0})


def test_the_help_shows_every_range():
    paragraphs = " ".join(build_parser(prog="train").format_help().split()).split(" --")
    for key, limits in RANGES.items():
        (text,) = [text for text in paragraphs if text.split()[0].rstrip("+") == key and "(type:" in text]
        assert f"({limits})" in text


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_refuse_what_is_outside(kind):
    spelled = {option.name: option.spelling for option in options_of(kind)}
    texts = {option.name: option.text for option in options_of(kind)}
    ranges = dict(ranges_of(kind))
    assert ranges
    for name, limits in ranges.items():
        assert texts[name].endswith(f"({limits})")
        below = next(outside(limits))
        with pytest.raises(ValueError, match=f"^{name}={below}") as error:
            parse(kind, [*COMMANDS[kind], f"{spelled[name]}={below}"], prog="command")
        assert " must be " in str(error.value)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"above": 0}, "more than 0"),
        ({"at_least": 0}, "0 or more"),
        ({"below": 1}, "less than 1"),
        ({"at_most": 1}, "1 or less"),
        ({"at_least": 0, "at_most": 1}, "in [0, 1]"),
        ({"above": 0, "below": 0.5}, "in (0, 0.5)"),
        ({"at_least": 0, "below": 1, "length": 2}, "two numbers in [0, 1)"),
    ],
)
def test_ranges_in_words(limits, words):
    assert str(Range(**limits)) == words


@dataclass
class Item:
    label: str = "first"
    weight: float | None = ranged(None, at_least=0)


@dataclass
class Whole:
    items: tuple[Item, ...] = ()
    shares: dict[str, float] = ranged(default_factory=dict, at_least=0)
    item: Item = field(default_factory=Item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": (Item(weight=-1),)}, "items: first weight=-1 must be 0 or more"),
        ({"shares": {"a": 1.0, "b": -0.5}}, "shares of b=-0.5 must be 0 or more"),
        ({"item": Item(weight=-2)}, "item.weight=-2 must be 0 or more"),
    ],
)
def test_ranges_are_found_inside(change, message):
    check_ranges(Whole((Item(weight=0),), {"a": 0.0}))
    with pytest.raises(ValueError) as error:
        check_ranges(Whole(**change))
    assert str(error.value) == message


def test_a_default_is_a_plain_value():
    assert operator.attrgetter("steps", "precision")(Config(model=ModelConfig()).train) == (1000, "bf16")
    assert PrepareConfig.validation_fraction == 0.01


def test_reading_settings_does_not_wait_for_torch():
    code = "import sys; from gptoss_dist.config import load_config; load_config('configs/quickstart.yaml')"
    code += "; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
