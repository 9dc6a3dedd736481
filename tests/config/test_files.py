"""Files of settings: one line for what is no such file, and long lists in linear time."""

import os
import time

import pytest

from gptoss_dist import ModelConfig
from gptoss_dist.config import load_config

TINY = "model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16}\n"


@pytest.mark.parametrize(
    "content, words",
    [
        ("train: {steps: 1, steps: 2}", "line 2: key 'steps' is there twice"),
        ("optim: {freeze: " + "[" * 1000, "nested more than 64"),
        ("optim:\n  freeze: &a [*a]", "inside of its own anchor"),
        ("run: !!python/object/apply:os.getcwd []", "is not known"),
        ("run: {name: \x1b[31m}", "is not readable YAML"),
        (b"run: {name: \xff}", "not UTF-8"),
        ("data: {sources: [" + "{path: a}, " * 5000 + "]}", "5,000 entries"),
        ("train: 5", "train=5 is no section"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(TINY.encode() + (content if isinstance(content, bytes) else content.encode()))
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert words in str(error.value) and "run.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["config", "section", "model", "engine.deepspeed"])
def test_no_pipe_is_waited_for(tmp_path, place):
    pipe, path = tmp_path / "pipe", tmp_path / "run.yaml"
    os.mkfifo(pipe)
    path.write_text(TINY)
    with pytest.raises(ValueError, match="pipe is a pipe, not a regular file"):
        if place == "config":
            load_config(path, pipe)
        elif place == "section":
            path.write_text("model: pipe")
            load_config(path)
        elif place == "model":
            ModelConfig.from_yaml(pipe)
        else:
            load_config(path, overrides={"engine.deepspeed": pipe})


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}', "[]", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, "{"])
def test_a_file_for_deepspeed_that_is_none_is_one_line(tmp_path, content):
    path, settings = tmp_path / "run.yaml", tmp_path / "ds.json"
    path.write_text(TINY)
    settings.write_text(content)
    with pytest.raises(ValueError, match=r"^engine\.deepspeed.*ds\.json[^\n]*$"):
        load_config(path, overrides={"engine.deepspeed": settings})


def test_long_lists_take_linear_time(tmp_path):
    """Each item once cost a copy of the whole list: 20,000 items took minutes, 200,000 would have taken days."""
    path = tmp_path / "run.yaml"
    path.write_text(TINY + "optim:\n  freeze:\n" + "".join(f"  - layer{i}\n" for i in range(20_000)))
    start = time.process_time()
    assert len(load_config(path).optim.freeze) == 20_000
    assert time.process_time() - start < 30
