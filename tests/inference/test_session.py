"""A session and what a person types at it; tests/launch/test_generate.py runs it whole."""

import builtins

import pytest

from data_pipeline.command_line import check_ranges
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.inference.interactive import repl
from gptoss_dist.inference.session import Session
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.transformer import GptOss
from launch.generate import GenerateOptions
from tests.support.ranks import MODEL


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device):
    with pytest.raises(ValueError, match=f"^device={device}"):
        Session.load("nowhere", device=device)


def test_settings_that_make_no_sense_leave_the_old_ones(monkeypatch, capsys):
    written = []

    class Recorded:
        def write(self, prompt, *, on_text, **settings):
            written.append(settings)

    lines = iter([":n -5", ":t nan", ":t inf", ":k 1.5", ":p 0", ":n 7", "ab", ":q"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))

    def check(changed):
        check_ranges(GenerateOptions("x", **changed))

    assert repl(Recorded(), {"temperature": 0.5, "max_new_tokens": 3, "top_k": 4, "top_p": 0.9}, check) == 0
    assert written == [{"temperature": 0.5, "max_new_tokens": 7, "top_k": 4, "top_p": 0.9}]
    out = capsys.readouterr().out
    assert out.count("could not: ") == 5 and "could not: max_new_tokens=-5 must be 1 or more" in out


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-7])
def test_any_temperature_writes_text_and_length_beyond_the_positions_is_said(caplog, temperature):
    model = GptOss(ModelConfig(**MODEL | {"max_position_embeddings": 8}))
    initialize(model, seed=0)
    session = Session(model, load_tokenizer("bytes"))
    written = session.write("abcd", max_new_tokens=4, temperature=temperature)
    assert written == session.write("abcd", max_new_tokens=4, temperature=0) and not caplog.records
    session.write("abcd", max_new_tokens=5, temperature=0.0)
    assert "a prompt of 4 tokens and up to 5 new ones are more than the 8 positions" in caplog.text
