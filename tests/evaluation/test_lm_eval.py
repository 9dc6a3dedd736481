"""Tasks of the EleutherAI harness (extra `eval`) on a model: as the export gives them through its own `hf` model."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.tokenizer.patterns import PATTERNS
from data_pipeline.tokenizer.published import load_tokenizer
from data_pipeline.tokenizer.tokenizer import Tokenizer
from gptoss_dist.config import EvaluationConfig
from gptoss_dist.distributed.processes import Ranks, seed_everything
from gptoss_dist.evaluation.harness import in_training, tasks
from gptoss_dist.evaluation.harness.in_training import TaskEvaluation
from gptoss_dist.evaluation.harness.team import Team
from gptoss_dist.evaluation.scoring import Request
from tests.support.harness_tasks import write_tasks
from tests.support.ranks import environment, losses, run


@pytest.fixture
def needs_harness():
    pytest.importorskip("lm_eval", reason="needs sh launch/install.sh --extras test,eval")
    pytest.importorskip("transformers")


# Without the harness ----------------------------------------------------------------------------------------------


def test_a_missing_harness_is_refused_by_name(monkeypatch, settings):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None if name == "lm_eval" else object())
    config = EvaluationConfig(every=2, tasks=["choose"])
    with pytest.raises(
        ValueError, match=r"^evaluation\.tasks needs lm_eval, which is not installed: sh launch/install"
    ):
        in_training.check_tasks(config)
    in_training.check_tasks(EvaluationConfig())  # a run without tasks needs nothing


@pytest.mark.distributed
def test_a_run_without_the_harness_is_refused_before_it_begins(settings, tmp_path):
    if tasks.find_spec("lm_eval"):
        pytest.skip("the harness is installed")
    options = ["--config", str(settings), "--evaluation.every", "2", "--evaluation.tasks", "[choose]"]
    for more in ([], ["--dry-run"]):
        done = run("launch/train.py", *options, *more, processes=2, expect=2)
        assert "evaluation.tasks needs lm_eval" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "tiny").exists()


class Answering:
    """A team of one process whose model knows everything."""

    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
    tokenizer = load_tokenizer("bytes")
    deadline = float("inf")

    def __init__(self) -> None:
        self.ended = 0

    def score(self, requests):
        return [1.5] * len(requests)

    def end(self) -> None:
        self.ended += 1


def harness(monkeypatch, work) -> TaskEvaluation:
    """Tasks that `work` does in the thread of the harness, with the desk at which it may ask."""
    evaluation = TaskEvaluation(EvaluationConfig(every=1, tasks=["x"], max_seconds=0.5))

    monkeypatch.setattr(TaskEvaluation, "_run_tasks", lambda self, desk, *arguments: work(desk))
    return evaluation


def test_the_training_thread_answers_what_the_harness_asks(monkeypatch):
    def work(desk):
        return tasks.Findings([], {"x/acc": sum(desk.score([Request([1, 2], 1)] * 3))})

    evaluation, team = harness(monkeypatch, work), Answering()
    for number in (1, 2):
        outcome = evaluation.measure(team, None)
        assert outcome.metrics == {"x/acc": 4.5} and not outcome.problem and team.ended == number


def test_a_harness_that_fails_or_dawdles_costs_no_more_than_it_may(monkeypatch):
    def fail(desk):
        raise KeyError("no such column")

    outcome = harness(monkeypatch, fail).measure(team := Answering(), None)
    assert not outcome.metrics and outcome.problem == "KeyError: 'no such column'" and team.ended == 1

    refused = []

    def dawdle(desk):
        time.sleep(1.5)
        try:
            return desk.score([Request([1, 2], 1)])
        except Exception as error:
            refused.append(type(error).__name__)
            raise

    evaluation, began = harness(monkeypatch, dawdle), time.monotonic()
    outcome = evaluation.measure(team := Answering(), None)
    assert time.monotonic() - began < 1.2 and "not finished after 0.5 s" in outcome.problem and team.ended == 1
    assert "still busy" in evaluation.measure(Answering(), None).problem
    evaluation._thread.join()
    assert refused == ["TimeIsUp"]


@pytest.mark.parametrize("late", [False, True])
def test_random_numbers_of_the_harness_are_not_those_of_training(monkeypatch, late):
    """Also when it goes on after its time, while training draws: what both draw is what each draws alone.

    If it ends in time, that holds for whatever it calls.
    """
    begun, drawn = threading.Event(), []

    def draw():
        choice = [random.random(), random.choice(range(99)), float(np.random.rand()), int(np.random.permutation(9)[0])]
        return [*choice, float(torch.rand(())), float(torch.empty(()).uniform_()), torch.randperm(9).tolist()]

    def draw_unseen():
        """Draw and seed in ways that the harness's thread has no generators of its own for."""
        torch.rand_like(torch.zeros(3))
        torch.nn.functional.dropout(torch.ones(9))
        torch.nn.Linear(3, 3)
        torch.random.manual_seed(1)
        torch.default_generator.manual_seed(2)
        torch.set_rng_state(torch.Generator().manual_seed(3).get_state())
        random._inst.seed(4)
        np.random.mtrand._rand.seed(5)

    def work(desk):
        assert begun.wait(5) if late else True
        drawn.append(draw())
        seed_everything(7, 0)
        drawn.append(draw())
        if not late:
            draw_unseen()
        return tasks.Findings([], {})

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    seed_everything(7, 0)
    seeded = draw()
    seed_everything(11, 0)
    after, expected = draw(), states()
    evaluation = harness(monkeypatch, work)
    seed_everything(11, 0)
    assert bool(evaluation.measure(Answering(), None).problem) == late
    begun.set()
    assert draw() == after
    evaluation._thread.join()
    assert states() == expected and len(drawn) == 2 and drawn[1] == seeded != drawn[0]


def test_an_error_of_the_model_is_raised_where_training_sees_it(monkeypatch):
    class Failing(Answering):
        def score(self, requests):
            raise RuntimeError("out of memory")

    evaluation = harness(monkeypatch, lambda desk: desk.score([Request([1, 2], 1)]))
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluation.measure(Failing(), None)


def test_rounds_end_at_the_deadline():
    from gptoss_dist.evaluation.harness.team import TimeIsUp

    team = Team(Answering.ranks, None, Answering.tokenizer, 64, deadline=time.monotonic() - 1)
    with pytest.raises(TimeIsUp):
        team.score([Request([1, 2], 1)])


# With it ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on the embedded corpus, its export, and tasks."""
    pytest.importorskip("lm_eval", reason="needs sh launch/install.sh --extras test,eval")
    root = tmp_path_factory.mktemp("lm_eval")
    from data_pipeline.prepare.__main__ import main

    assert main(["synthetic", "--output", str(root / "data"), "--tokenizer", "builtin", "--max-documents", "200"]) == 0
    shape = "--model.num_hidden_layers 2 --model.hidden_size 64 --model.max_position_embeddings 96 --data.seq_len 64"
    steps = "--train.steps 10 --train.micro_batch_size 2 --optim.lr 3e-3 --optim.warmup_steps 2 --checkpoint.every 10"
    quiet = "--validation.every 0 --sampling.prompts [] --tracking.mlflow false --tracking.plots false"
    options = ["--config", "configs/quickstart.yaml", "--data.path", str(root / "data"), "--run.dir", str(root / "run")]
    options += f"{shape} {steps} {quiet}".split()
    run("launch/train.py", *options)
    export = ["export", str(root / "run"), "--output", str(root / "export"), "--dtype", "float32"]
    run("launch/convert.py", *export)
    return SimpleNamespace(root=root, run=root / "run", export=root / "export", tasks=write_tasks(root))


def samples_of_hf(trained, tmp_path, *names: str, more: tuple[str, ...] = ()) -> dict[tuple[str, int], dict]:
    """What the harness's own command finds out of the export."""
    line = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={trained.export},dtype=float32",
    ]
    line += [
        "--tasks",
        ",".join(names),
        "--include_path",
        str(trained.tasks),
        "--device",
        "cpu",
        "--log_samples",
        *more,
    ]
    line += ["--output_path", str(tmp_path / "hf")]
    offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in (tmp_path / "hf").rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        found |= {(task, row["doc_id"]): row for row in map(json.loads, path.read_text().splitlines())}
    return found


def ours(trained, folder, *options: str, processes: int = 1) -> dict[tuple[str, int], dict]:
    """What this project's command finds out of the run."""
    base = ["--checkpoint", str(trained.run), "--include", str(trained.tasks), "--output", str(folder), "--no-mlflow"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(trained.root / "cache")}
    run("launch/evaluate.py", "lm-eval", *base, *options, processes=processes, **offline)
    rows = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return {(row["task"], row["doc_id"]): row for row in rows}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and found
    for key, row in found.items():
        other = expected[key]
        for mine, theirs in zip(row["resps"], other["resps"], strict=True):
            if key[0] == "write":
                assert mine == theirs
                continue
            (mine,), (theirs,) = mine, theirs
            numbers = (mine, theirs) if key[0] == "rolling" else (mine[0], theirs[0])
            assert float(numbers[0]) == pytest.approx(float(numbers[1]), abs=1e-4)
            assert key[0] == "rolling" or str(mine[1]) == str(theirs[1])
        for name in row["metrics"]:
            assert np.ravel(row[name]).astype(float) == pytest.approx(np.ravel(other[name]).astype(float), abs=1e-4)


def test_templates_are_compiled_once(needs_harness):
    from lm_eval import utils

    with tasks.templates_compiled_once(), tasks.templates_compiled_once():
        template = utils.env.from_string("{{a}}")
        assert utils.env.from_string("{{a}}") is template and utils.apply_template("{{a}}", {"a": 5}) == "5"
    assert "from_string" not in vars(utils.env)


@pytest.mark.distributed
def test_answers_are_those_of_the_export_in_the_harnesss_own_model(needs_harness, trained, tmp_path):
    names = ("choose", "write", "rolling")
    expected = samples_of_hf(trained, tmp_path, *names)
    found = ours(trained, tmp_path / "one", "--tasks", *names)
    assert_same(found, expected)
    written = [row["resps"][0][0] for key, row in found.items() if key[0] == "write"]
    assert len(set(written)) > 1 and len({row["resps"][0][0][0] for k, row in found.items() if k[0] == "choose"}) > 1
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in result["rows"]}
    assert rows["choose", "acc"]["documents"] == 12
    assert result["metrics"]["eval/choose/acc"] == rows["choose", "acc"]["value"]
    assert_same(ours(trained, tmp_path / "two", "--tasks", *names, processes=2), expected)


@pytest.mark.distributed
@pytest.mark.slow
def test_chat_and_examples_are_those_of_the_harnesss_own_model(needs_harness, trained, tmp_path):
    """The longer prompts are cut to the positions of the model, as there."""
    more = ("--apply_chat_template", "--fewshot_as_multiturn", "--num_fewshot", "2", "--limit", "5")
    expected = samples_of_hf(trained, tmp_path, "choose", "write", more=more)
    options = ("--tasks", "choose", "write", "--chat", "--num-fewshot", "2", "--limit", "5")
    assert_same(ours(trained, tmp_path / "ours", *options), expected)


@pytest.mark.distributed
def test_mistakes_are_one_line_in_two_processes(needs_harness, trained, tmp_path):
    base = ["lm-eval", "--checkpoint", str(trained.run), "--include", str(trained.tasks), "--no-mlflow"]
    (trained.tasks / "broken.yaml").write_text((trained.tasks / "choose.yaml").read_text().replace("rows", "gone"))
    text = (trained.tasks / "broken.yaml").read_text().replace("task: choose", "task: broken")
    (trained.tasks / "broken.yaml").write_text(text)
    for names, message in (
        (["chose"], "tasks=chose is no task in"),
        (["broken"], "tasks=broken cannot be loaded"),
    ):
        options = ["--tasks", *names, "--output", str(tmp_path / names[0])]
        done = run("launch/evaluate.py", *base, *options, processes=2, expect=2, HF_HUB_OFFLINE="1")
        lines = [line for line in done.stderr.splitlines() if line.startswith("evaluate.py:")]
        assert len(lines) == 1 and message in lines[0], done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / names[0]).exists()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param("--parallel.expert_parallel 2", id="experts"),
        pytest.param("--engine.zero_stage 3", id="zero3", marks=pytest.mark.slow),
        pytest.param("--train.compile true", id="compiled", marks=[pytest.mark.slow, pytest.mark.compiled]),
    ],
)
def test_tasks_in_a_run_change_nothing_of_it(needs_harness, settings, tmp_path, sharded):
    """Two ranks share the weights: metrics are those of the checkpoint, and losses as without tasks."""
    folder = write_tasks(tmp_path, documents=6)
    base = ["--config", str(settings), "--train.steps", "4", *sharded.split(), "--optim.lr", "1e-2"]
    base += ["--validation.every", "0", "--model.max_position_embeddings", "128"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    run("launch/train.py", *base, "--run.dir", str(tmp_path / "plain"), processes=2)
    options = ["--evaluation.every", "2", "--evaluation.tasks", "[choose, write]", "--evaluation.include", str(folder)]
    options += ["--evaluation.limit", "4", "--run.dir", str(tmp_path / "with")]
    done = run("launch/train.py", *base, *options, processes=2, **offline)
    assert losses(tmp_path / "with") == losses(tmp_path / "plain")
    acc = losses(tmp_path / "with", "eval/choose/acc_norm")
    assert acc.keys() == {2, 4} and set(losses(tmp_path / "with", "eval/write/exact_match")) == {2, 4}
    assert "choose/acc" in done.stderr
    evaluate = ["--checkpoint", str(tmp_path / "with"), "--tasks", "choose", "--include", str(folder), "--limit", "4"]
    run("launch/evaluate.py", "lm-eval", *evaluate, "--output", str(tmp_path / "out"), "--no-mlflow", **offline)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["eval/choose/acc_norm"] == acc[4]


@pytest.mark.distributed
def test_a_run_goes_on_when_tasks_fail_or_take_too_long(needs_harness, settings, tmp_path):
    folder = write_tasks(tmp_path, documents=4)
    base = ["--config", str(settings), "--train.steps", "3", "--validation.every", "0", "--evaluation.every", "2"]
    base += ["--evaluation.include", str(folder), "--evaluation.tasks", "[choose]"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    options = ["--run.dir", str(tmp_path / "hurried"), "--evaluation.max_seconds", "0.001"]
    done = run("launch/train.py", *base, *options, processes=2, **offline)
    assert "no evaluation, not finished after 0.001 s" in done.stderr and "finished at step 3" in done.stderr
    os.remove(tmp_path / "rows.jsonl")
    done = run("launch/train.py", *base, "--run.dir", str(tmp_path / "failed"), processes=2, **offline)
    assert "no evaluation, ValueError: tasks=choose cannot be loaded" in done.stderr
    assert set(losses(tmp_path / "failed")) == {1, 2, 3}
    done = run("launch/train.py", *base, "--evaluation.tasks", "[nothing]", processes=2, expect=2)
    assert "evaluation.tasks=nothing is no task" in done.stderr and not (tmp_path / "tiny").exists()
    done = run("launch/train.py", *base, "--dry-run")
    assert "choose every 2 steps, 200 documents each, at most 300 s" in done.stdout


@pytest.mark.distributed
def test_a_chat_without_a_template_is_refused_before_training(needs_harness, settings, tmp_path):
    plain = Tokenizer("plain", {bytes([byte]): byte for byte in range(256)}, PATTERNS["bytes"], {"<|endoftext|>": 256})
    plain.save(tmp_path / "plain")
    from data_pipeline.prepare.__main__ import main

    prepare = ["synthetic", "--output", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "plain")]
    assert main([*prepare, "--validation-fraction", "0.2", "--max-documents", "100"]) == 0
    options = ["--config", str(settings), "--data.path", str(tmp_path / "data"), "--evaluation.every", "2"]
    options += ["--evaluation.include", str(write_tasks(tmp_path, documents=4)), "--evaluation.tasks", "[choose]"]
    options += ["--evaluation.chat", "true"]
    done = run("launch/train.py", *options, processes=2, expect=2)
    refusal = "evaluation.chat=true needs a chat template: no chat_template.jinja came with the model's weights, and "
    assert refusal in done.stderr and "give --evaluation.chat=false" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "tiny").exists()
    done = run("launch/train.py", *options, "--dry-run")
    assert f"NOT READY: {refusal}" in done.stdout
