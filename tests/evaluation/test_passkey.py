"""`launch/evaluate.py passkey`: what is asked, how answers are counted, and with which rotary embedding."""

import json
import math

import pytest
import torch

from data_pipeline import load_tokenizer
from data_pipeline.needles.tasks import TASKS
from gptoss_dist.checkpoint import save_pretrained
from gptoss_dist.evaluation.options import PasskeyOptions
from gptoss_dist.evaluation.retrieval import passkey
from gptoss_dist.evaluation.retrieval.scaling import with_yarn
from gptoss_dist.evaluation.retrieval.trials import Place, judge, make_trial, places, wilson_interval
from gptoss_dist.model.config import ModelConfig, RopeScaling
from gptoss_dist.model.init import initialize
from gptoss_dist.model.rope import inverse_frequencies
from gptoss_dist.model.transformer import GptOss
from tests.support.needles import solve
from tests.support.ranks import MODEL, run

BYTES = load_tokenizer("bytes")
WORDS_LENGTH = 480  # of bytes: room for every task


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An untrained model as a folder."""
    folder = tmp_path_factory.mktemp("passkey") / "untrained"
    model = GptOss(ModelConfig(**MODEL | {"rope_scaling": None}))
    initialize(model, seed=0)
    save_pretrained(model, folder)
    BYTES.save(folder)
    return folder


def evaluate(folder, output, **options) -> dict:
    values = {"lengths": [WORDS_LENGTH], "depths": 2, "trials": 2, "mlflow": False} | options
    passkey.evaluate(PasskeyOptions(checkpoint=str(folder), output=str(output), **values))
    return json.loads((output / "result.json").read_text())


def by_definition(correct: int, trials: int) -> tuple[float, float]:
    """The shares p that are within 1.96 of their own standard deviations of what was seen, found by bisection."""
    seen = correct / trials

    def is_far(p: float) -> bool:
        return abs(seen - p) > 1.959963984540054 * math.sqrt(p * (1 - p) / trials)

    def border(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_far(middle) else (middle, outside)
        return inside

    return border(seen, 0.0) if correct else 0.0, border(seen, 1.0) if correct < trials else 1.0


@pytest.mark.parametrize("trials", [1, 2, 7, 10, 100, 3001])
def test_intervals_are_those_of_the_definition(trials):
    for correct in {0, 1, trials // 2, trials - 1, trials}:
        low, high = wilson_interval(correct, trials)
        assert (low, high) == pytest.approx(by_definition(correct, trials), abs=1e-9)
        assert 0 <= low <= correct / trials <= high <= 1 and low < high
    assert wilson_interval(95, 100) == pytest.approx((0.888, 0.978), abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_a_trial_depends_on_its_place_and_the_seed_alone(task):
    prompts = set()
    for place in places([WORDS_LENGTH, WORDS_LENGTH + 1], buckets=3, trials=2):
        trial = make_trial(task, place, 3, seed=1, tokenizer=BYTES)
        assert len(trial.ids) == place.length and place.bucket / 3 <= trial.depth <= (place.bucket + 1) / 3
        assert make_trial(task, place, 3, 1, BYTES).ids == trial.ids
        assert make_trial(task, place, 3, 2, BYTES).ids != trial.ids
        assert judge(trial, solve(BYTES.decode(trial.ids))).correct and not judge(trial, " no").correct
        prompts.add(tuple(trial.ids))
    assert len(prompts) == 12


def test_an_untrained_model_is_at_chance_and_the_files_say_so(exported, tmp_path, capsys):
    found = evaluate(exported, tmp_path / "out", yarn=["model", "auto"], original_length=100)
    assert [row["yarn"] for row in found["rows"]] == ["model", "auto"]
    for row in found["rows"]:
        assert row["accuracy"] == row["low"] == 0 and row["verdict"] == "at chance" and row["trials"] == 4
        assert row["high"] == pytest.approx(wilson_interval(0, 4)[1])
    assert found["chance"]["guess"] == 1 / 90_000 and "1 in 90,000" in capsys.readouterr().out
    assert found["metrics"] == {f"eval/passkey/yarn_{yarn}/accuracy_480": 0.0 for yarn in ("model", "auto")}
    assert len(found["by_depth"]) == 4 and len(found["outcomes"]) == 8
    assert found["settings"]["original_length"] == 100 and (tmp_path / "out/heat_map.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"--output .*out exists already"):
        evaluate(exported, tmp_path / "out")


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_the_last_half_finds_what_stands_there(exported, tmp_path, monkeypatch, capsys, task):
    """The whole verb with another reader in the model's place: what it reads and what is counted belong together."""

    def read(model, tokenizer, trials):
        for trial in trials:
            text = tokenizer.decode(trial.ids)
            yield solve(text) if trial.depth >= 0.5 else " 12345, ABC"

    monkeypatch.setattr(passkey, "answers", lambda *arguments: list(read(*arguments)))
    monkeypatch.setattr("gptoss_dist.evaluation.pace.EVERY_S", 0.0)
    found = evaluate(exported, tmp_path / "out", task=task, depths=4, lengths=[WORDS_LENGTH, 700], batch_tokens=1000)
    assert "yarn model, 700 tokens: 3 of 7, 1 to go in this process\n" in capsys.readouterr().err
    assert [row["accuracy"] for row in found["rows"]] == [0.5, 0.5]
    assert [row["verdict"] for row in found["rows"]] == ["above chance"] * 2
    assert [part["accuracy"] for part in found["by_depth"]] == [0, 0, 1, 1] * 2
    assert all(part["low"] == wilson_interval(2 * (part["depth"] >= 0.5), 2)[0] for part in found["by_depth"])


def test_yarn_is_that_of_a_model_that_was_made_with_it():
    plain = ModelConfig(**MODEL | {"rope_scaling": None})
    made = ModelConfig(**MODEL | {"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=64)})
    long = {"spare": 5, "original_length": 64}
    assert with_yarn(plain, "4", 256, **long).rope_scaling == made.rope_scaling
    assert with_yarn(plain, "auto", 256, **long).rope_scaling == made.rope_scaling
    assert with_yarn(made, "model", 256, **long).rope_scaling == made.rope_scaling
    for config, yarn, length in ((made, "none", 256), (made, "auto", 64), (made, "1", 256), (plain, "model", 256)):
        assert with_yarn(config, yarn, length, **long).rope_scaling is None
    beta = ModelConfig(**MODEL | {"rope_scaling": RopeScaling(factor=2.0, beta_fast=8.0)})
    assert with_yarn(beta, "auto", 640, **long).rope_scaling == RopeScaling(
        factor=10.0, original_max_position_embeddings=64, beta_fast=8.0
    )
    found = with_yarn(made, "auto:4", 640, **long).rope_scaling
    assert (found.factor, found.beta_fast, found.beta_slow) == (10.0, 4.0, 1.0) and made.rope_scaling.beta_fast == 32
    assert with_yarn(plain, "none", 256, **long).max_position_embeddings == 261
    frequencies, factor = inverse_frequencies(with_yarn(plain, "4", 256, **long), "full_attention")
    assert factor == pytest.approx(1 + 0.1 * math.log(4)) and frequencies[-1] < inverse_frequencies(plain, "")[0][-1]


def test_a_model_with_yarn_shares_the_weights_and_computes_as_one_that_was_built_so():
    plain = ModelConfig(**MODEL | {"rope_scaling": None, "tie_word_embeddings": True})
    model = GptOss(plain)
    initialize(model, seed=0)
    ids = torch.arange(200)[None] % 256
    before = model(ids)
    config = with_yarn(plain, "8", 200, 25, spare=0)
    twin = passkey.with_config(model, config)
    built = GptOss(config)
    built.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids), built(ids)) and not torch.allclose(twin(ids), before)
    assert torch.equal(model(ids), before) and twin.lm_head.weight is twin.model.embed_tokens.weight
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.data_ptr() == its.data_ptr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yarn": ["4"]}, "yarn=4 needs --original-length"),
        ({"yarn": ["0.5"], "original_length": 64}, "yarn=0.5 must be model, none, auto or a factor"),
        ({"yarn": ["nan"], "original_length": 64}, "yarn=nan must be model, none, auto or a factor"),
        ({"yarn": ["auto:0"], "original_length": 64}, "yarn=auto:0 must be model, none, auto or a factor"),
        ({"yarn": ["none:4"], "original_length": 64}, "yarn=none:4 must be model, none, auto or a factor"),
        ({"yarn": ["8.1.2"], "original_length": 64}, r"yarn=8\.1\.2 must be model, none, auto or a factor"),
        ({"yarn": ["long"], "original_length": 64}, "yarn=long must be model, none, auto or a factor"),
        ({"yarn": []}, "yarn"),
        ({"depths": 0}, "depths=0"),
        ({"lengths": [100, 0]}, "lengths"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [128, 64, 128]}, "lengths=128 is there twice"),
        ({"yarn": ["none", "none"]}, "yarn=none is there twice"),
        ({"trials": 0}, "trials=0"),
        ({"lengths": [200]}, "a length of 200 is too little for the task passkey"),
    ],
)
def test_impossible_wishes_are_refused(exported, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(exported, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_length_that_is_too_short_for_any_trial_is_refused_before_the_first(exported, tmp_path, monkeypatch):
    """Things have names of different lengths: what the first trial needs says nothing of the others."""
    monkeypatch.setattr(passkey, "answers", lambda *arguments: pytest.fail("a trial was computed"))

    options = {"task": "multi-key", "depths": 2, "trials": 3}
    rest = [(1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    short = next(n for n in range(200, 400) if fits(n, 0, 0) and not all(fits(n, *place) for place in rest))
    with pytest.raises(ValueError, match=rf"length of {short} is too little .*; give \d+ or more"):
        evaluate(exported, tmp_path / "out", lengths=[short], **options)
    assert not (tmp_path / "out").exists()


def fits(length: int, bucket: int, trial: int) -> bool:
    try:
        make_trial("multi-key", Place(length, bucket, trial), 2, 0, BYTES)
    except ValueError:
        return False
    return True


def test_a_length_that_the_model_was_not_made_for_is_said(exported, tmp_path, capsys):
    evaluate(exported, tmp_path / "out", depths=1, trials=1)
    assert "480 tokens are longer than the 64 positions that the model was made for" in capsys.readouterr().err


@pytest.mark.distributed
def test_ranks_share_the_trials_and_a_mistake_is_said_once(exported, tmp_path):
    words = ["passkey", "--checkpoint", str(exported), "--lengths", "480", "--depths", "3", "--trials", "1"]
    words += ["--no-mlflow", "--output"]
    run("launch/evaluate.py", *words, str(tmp_path / "one"))
    done = run("launch/evaluate.py", *words, str(tmp_path / "two"), processes=2)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["outcomes"] == two["outcomes"] and len(one["outcomes"]) == 3 and one["rows"] == two["rows"]
    assert done.stdout.count("results in") == 1
    done = run("launch/evaluate.py", *words, str(tmp_path / "two"), processes=2, expect=2)
    assert done.stderr.count("exists already") == 1 and "Traceback" not in done.stderr
