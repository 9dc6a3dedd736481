"""A session and what a person types at it; tests/launch/test_generate.py runs it whole."""

import builtins
import json
from pathlib import Path

import pytest
import torch

from data_pipeline.command_line import check_ranges
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.checkpoint import export, open_pretrained
from gptoss_dist.inference import session as session_module
from gptoss_dist.inference.interactive import REPL_SETTINGS, repl
from gptoss_dist.inference.session import Session
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.transformer import GptOss
from launch.generate import INTERACTIVE, GenerateOptions
from tests.support.ranks import MODEL

RUN = Path(__file__).parents[1] / "checkpoint" / "fixtures" / "step_00000003"


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cuda:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device):
    with pytest.raises(ValueError, match=f"^device={device}"):
        Session.load("nowhere", device=device)


def test_a_text_ends_where_other_programs_end_that_of_an_export(tmp_path, caplog):
    """At Harmony's stops and the end of a document, and at the ids of the generation settings beside the model."""
    session = Session.load(RUN, device="cpu")
    free = session.samples(["ab"], max_new_tokens=6, temperature=0.0)[0][0]
    assert free.finish == "length" and len(set(free.ids[:4])) == 4
    for name in ("<|return|>", "<|endoftext|>", "<|call|>"):
        stop, replaced = session.tokenizer.special_tokens[name], free.ids[2]
        swapped = torch.arange(len(session.model.lm_head.weight))
        swapped[[stop, replaced]] = swapped[[replaced, stop]]
        kept = session.model.lm_head.weight.data
        session.model.lm_head.weight.data = kept[swapped]
        ((found,),) = session.samples(["ab"], max_new_tokens=6, temperature=0.0)
        assert (found.ids, found.finish) == (free.ids[:2], "stop"), name
        session.model.lm_head.weight.data = kept

    export(open_pretrained(RUN), tmp_path / "export", "hf", dtype=torch.float32)
    for ids, kept in ((free.ids[3], 3), ([free.ids[1], 5], 1), ([], 6), (None, 6), ([free.ids[1], 265], 6), ("37", 6)):
        (tmp_path / "export" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        caplog.clear()
        loaded = Session.load(tmp_path / "export", device="cpu")
        assert loaded.samples(["ab"], max_new_tokens=6, temperature=0.0)[0][0].ids == free.ids[:kept]
        said = [record.getMessage() for record in caplog.records if record.name == session_module.__name__]
        assert len(said) == (ids in ([free.ids[1], 265], "37"))
        assert all(f"eos_token_id={json.dumps(ids)} is none of the tokenizer's 265 ids" in line for line in said)
    (tmp_path / "export" / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert Session.load(tmp_path / "export", device="cpu").stop_ids[-1] == 0


def test_settings_that_make_no_sense_leave_the_old_ones(monkeypatch, capsys):
    written = []

    class Recorded:
        def write(self, prompt, *, on_text, **settings):
            written.append(settings)
            if prompt == "stopped":
                raise KeyboardInterrupt
            if prompt == "long":
                torch.empty(2**60, dtype=torch.uint8)

    wrong = [":n -5", ":t nan", ":t inf", ":k 1.5", ":p 0", ":t 1e39", ":r 1e-46", ":t", ":m 0,1", ":k " + "9" * 5000]
    lines = iter([*wrong, ":n 9000000000000000000", ":n 7", "long", "stopped", "ab", ":q"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))

    def check(changed):
        check_ranges(GenerateOptions("x", **changed))

    assert repl(Recorded(), {"temperature": 0.5, "max_new_tokens": 3, "top_k": 4, "top_p": 0.9}, check, ":q quit") == 0
    assert written == [{"temperature": 0.5, "max_new_tokens": 7, "top_k": 4, "top_p": 0.9}] * 3
    shown = capsys.readouterr().out.splitlines()
    said = [line for line in shown if line.startswith("could not: ")]
    assert all(f"{command} " in INTERACTIVE for command in REPL_SETTINGS)
    assert shown[0] == ":q quit" and shown[-3:] == ["stopped", "interrupted; :q quits", "ab"]
    expected = [
        "max_new_tokens=-5 must be in [1, 1000000000]",
        "temperature=nan must be a finite number",
        "temperature=inf must be a finite number",
        "top_k='1.5' must be a whole number; type for example :k 50",
        "top_p=0.0 must be positive",
        "temperature=1e+39 must be in [0, 1000000]",
        "repetition_penalty=1e-46 must be in [1e-06, 1000000]",
        "temperature is given no value; type for example :t 0.8",
        "min_p='0,1' must be a number; type for example :m 0.05",
        f"top_k='{'9' * 40}...' must be a whole number; type for example :k 50",
        "max_new_tokens=9000000000000000000 must be in [1, 1000000000]",
        "not enough memory: can't allocate memory: you tried to allocate",
    ]
    assert len(said) == len(expected)
    for line, words in zip(said, expected):
        assert line.startswith(f"could not: {words}")


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-7])
def test_any_temperature_writes_text_and_length_beyond_the_positions_is_said(caplog, temperature):
    model = GptOss(ModelConfig(**MODEL | {"max_position_embeddings": 8}))
    initialize(model, seed=0)
    session = Session(model, load_tokenizer("bytes"))
    written = session.write("abcd", max_new_tokens=4, temperature=temperature)
    assert written == session.write("abcd", max_new_tokens=4, temperature=0) and not caplog.records
    assert session.write("abcd", max_new_tokens=4, temperature=0, stop=written[:1]) == ""
    with pytest.raises(ValueError, match="prompts is a text"):
        session.samples("abcd", max_new_tokens=4)
    session.write("abcd", max_new_tokens=5, temperature=0.0)
    assert "a prompt of 4 tokens and up to 5 new ones are more than the 8 positions" in caplog.text
