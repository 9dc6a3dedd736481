"""Training as a user starts it: resume, layouts, signals, mistakes."""

import json
import os
import shlex
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from gptoss_dist import load_pretrained
from gptoss_dist.checkpoint import checkpoints
from gptoss_dist.inference.session import Session
from gptoss_dist.tracking.tracker import read_metrics
from tests.support.ranks import ROOT, losses, run, start
from tests.support.token_data import write_dataset

pytestmark = pytest.mark.distributed


def weights(folder) -> dict[str, torch.Tensor]:
    return dict(load_pretrained(folder).named_parameters())


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_interrupted_and_resumed_is_bit_identical(settings, tmp_path, processes):
    # Jitter makes the result depend on the random generators; tied weights, document masks and samples are what
    # resuming has broken elsewhere.
    options = shlex.split(
        f"--config {settings} --loss.router_jitter 0.05 --model.tie_word_embeddings true --data.document_mask true "
        "--sampling.every 5 --sampling.prompts '[a, bc]' --train.deterministic true"
    )
    if processes == 1:
        options += ["--tracking.mlflow", "true", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(
        "launch/train.py",
        *options,
        *shlex.split(f"--run.dir {whole} --checkpoint.keep 0"),
        processes=processes,
        launcher="torchrun" if processes > 1 else None,
    )
    assert [p.name for p in checkpoints(whole / "checkpoints")] == [f"step_{n:08d}" for n in (4, 8, 12)]
    # What a kill in step 11 leaves behind: two checkpoints, an unfinished one, and rows of lost steps.
    shutil.copytree(whole, parts)
    (parts / "checkpoints" / "step_00000012").rename(parts / "checkpoints" / "step_00000012.tmp")
    lines = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == 10)
    (parts / "metrics.jsonl").write_text("".join(lines[: kept + 1]) + lines[kept + 1][:20])

    run("launch/train.py", *options, "--run.dir", str(parts), "--resume", "auto", processes=processes)
    assert losses(whole) == losses(parts)
    assert sorted(losses(whole)) == list(range(1, 13))
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(whole, "loss/val") == losses(parts, "loss/val")
    saved = checkpoints(parts / "checkpoints")
    assert [p.name for p in saved] == ["step_00000008", "step_00000012"]
    samples = sorted(p.name for p in (parts / "samples").iterdir())
    assert samples == [f"step_{n:08d}.txt" for n in (5, 10, 12)]
    assert all((parts / "samples" / n).read_text() == (whole / "samples" / n).read_text() for n in samples)
    if processes == 1:
        ids = [json.loads((folder / "tracking" / "cursor.json").read_text())["run_id"] for folder in (whole, parts)]
        assert ids[0] is not None and ids[0] == ids[1]
        # What a kill between the last checkpoint and the deletion of older ones leaves: the next start deletes it.
        shutil.copytree(whole / "checkpoints" / "step_00000004", parts / "checkpoints" / "step_00000004")
        shutil.copytree(whole / "checkpoints" / "step_00000004", parts / "checkpoints" / "step_00000003.tmp.old")
        run("launch/train.py", *options, "--run.dir", str(parts), "--resume", "auto")
        assert sorted((parts / "checkpoints").glob("step_*")) == saved


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost(settings, tmp_path):
    """SIGKILL while a checkpoint is being written, between two of them, and in mid-step: the run ends bit-identical.

    tests/stress draws the moments, on one process and two.
    """
    options = shlex.split(
        f"--config {settings} --checkpoint.every 2 --train.steps 40 --validation.every 0 --train.deterministic true "
        "--model.tie_word_embeddings true"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("launch/train.py", *options, "--run.dir", str(whole))
    again = [*options, "--run.dir", str(killed), "--resume", "auto"]

    def writing() -> bool:
        return any((killed / "checkpoints").glob("step_0000001*.tmp"))

    def reached(step: int) -> bool:
        return max(losses(killed), default=0) >= step

    steps = []
    for moment in (writing, lambda: reached(19), lambda: reached(28)):
        process = start("launch/train.py", *again)
        deadline = time.time() + 120
        while not ((killed / "metrics.jsonl").is_file() and moment()):
            assert time.time() < deadline and process.is_running(), f"the run ended first, after {steps}"
            time.sleep(0.001)
        process.send(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        steps.append(max(losses(killed)))
    assert len(set(steps)) == 3 and steps[-1] < 40, steps
    run("launch/train.py", *again)
    assert losses(killed) == losses(whole)
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_on_other_data_is_refused(settings):
    run("launch/train.py", "--config", str(settings), "--train.steps", "4", "--validation.every", "0")
    folder = settings.parent / "tiny"
    saved = folder / "config.yaml"
    folder_after_run, config = sorted(p.name for p in folder.rglob("*")), saved.read_text()
    lost = "its place in the data is lost"
    changes = {
        "--data.seq_len": ("32", lost),
        "--run.seed": ("5", lost),
        "--train.steps": ("3", "is at step 4 and train.steps=3: nothing is left to train"),
        "--model.intermediate_size": (
            "16",
            "was trained with model.intermediate_size=32, now it is 16; give --model.intermediate_size as",
        ),
    }
    for option, (value, message) in changes.items():
        done = run("launch/train.py", "--config", str(settings), "--resume", "auto", option, value, expect=2)
        assert message in done.stderr and "Traceback" not in done.stderr
        assert folder_after_run == sorted(p.name for p in folder.rglob("*")) and config == saved.read_text()


def test_another_run_s_checkpoint_is_not_mixed_with_those_in_the_folder(settings, tmp_path):
    """A rewind, or `--resume auto`, could not tell them apart later."""
    options = shlex.split(f"--config {settings} --validation.every 0 --train.steps 4")
    for name in ("one", "two"):
        run("launch/train.py", *options, "--run.dir", str(tmp_path / name))
    other = tmp_path / "two/checkpoints/step_00000004"
    done = run("launch/train.py", *options, f"--run.dir={tmp_path / 'one'}", "--resume", str(other), expect=2)
    assert "one/checkpoints holds checkpoints already; continue with --resume auto" in done.stderr


def test_a_checkpoint_resumes_on_other_layouts(settings, tmp_path):
    """Written by four processes that spread the experts over pairs; whoever goes on, the losses are the same."""
    options = shlex.split(
        f"--config {settings} --train.steps 8 --validation.every 0 --checkpoint.keep 0 --model.num_local_experts 6 "
        "--model.router_selection_bias true --loss.selection_bias_rate 0.001"
    )
    whole = tmp_path / "whole"
    run(
        "launch/train.py",
        *options,
        *shlex.split(
            f"--run.dir {whole} --train.micro_batch_size 1 --parallel.expert_parallel 2 --train.profile_step 2"
        ),
        processes=4,
    )
    expected = losses(whole)
    assert losses(whole, "moe/rank_rows_max_over_mean").keys() >= {1, 2}
    assert "alltoall" in (whole / "profile" / "kernels_00000002.txt").read_text()
    assert json.loads((whole / "profile" / "trace_00000002.json").read_text())["traceEvents"]
    for processes, expert_parallel in ((4, 1), (2, 2), (1, 1)):
        folder = tmp_path / f"{processes}x{expert_parallel}"
        run(
            "launch/train.py",
            *options,
            *shlex.split(
                f"--run.dir {folder} --train.micro_batch_size {4 // processes} "
                f"--parallel.expert_parallel {expert_parallel} --resume {whole / 'checkpoints' / 'step_00000004'}"
            ),
            processes=processes,
        )
        assert sorted(losses(folder)) == [5, 6, 7, 8]
        for name in ("loss/train", "loss/aux", "optim/grad_norm"):
            resumed, uninterrupted = losses(folder, name), losses(whole, name)
            assert all(resumed[n] == pytest.approx(uninterrupted[n], rel=2e-6) for n in resumed), name
    assert expected[8] < expected[1]


def test_balance_without_a_loss_and_forced_routing(settings, tmp_path):
    """The selection bias is part of the checkpoint: for a resume, and for inference. Forced routing is labelled."""
    options = shlex.split(
        f"--config {settings} --model.router_selection_bias true --loss.aux_coef 0 --loss.selection_bias_rate 0.01 "
        "--validation.every 0 --resume auto"
    )
    run("launch/train.py", *options, "--train.steps", "4")
    done = run("launch/train.py", *options, "--train.steps", "6", "--train.routing", "balanced")
    assert "train.routing=balanced: a benchmark" in done.stderr
    forced = losses(tmp_path / "tiny", "moe/forced_routing")
    assert forced == {5: 1.0, 6: 1.0} and losses(tmp_path / "tiny", "moe/load_cv")[6] == 0
    model = Session.load(tmp_path / "tiny").model
    bias_E = model.model.layers[0].mlp.router.selection_bias
    assert bias_E.dtype == torch.float32 and 0 < bias_E.abs().max() <= 0.04 + 1e-6  # four steps of 0.01 at most


def test_layout_does_not_change_the_losses(settings, tmp_path):
    options = ["--config", str(settings), "--train.steps", "20", "--validation.every", "10"]
    run("launch/train.py", *options, "--run.dir", str(tmp_path / "one"), "--train.micro_batch_size", "4")
    run("launch/train.py", *options, "--run.dir", str(tmp_path / "two"), processes=2)
    one = losses(tmp_path / "one")
    assert len(one) == 20 and one[20] < one[1]
    for name in ("loss/train", "loss/aux", "loss/z", "loss/val", "optim/grad_norm"):
        a, b = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
        assert a.keys() == b.keys() and len(a) >= 3
        assert max(abs(a[step] - b[step]) for step in a) <= 1e-5, name


def start_training(settings, folder, *options: str):
    """Start a run of two processes without an end, and return it when it has taken some steps."""
    process = start(
        "launch/train.py",
        *shlex.split(
            f"--config {settings} --run.dir {folder} --train.steps 100000 --checkpoint.every 0 --validation.every 0"
        ),
        *options,
        processes=2,
    )
    deadline = time.time() + 240
    while not ((folder / "metrics.jsonl").is_file() and len(losses(folder)) > 3):
        assert time.time() < deadline and process.is_running()
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("engine", [[], ["--engine.zero_stage", "3"]], ids=["fsdp", "zero-3"])
def test_sigterm_saves_and_leaves(settings, tmp_path, engine):
    folder = tmp_path / "stopped"
    process = start_training(settings, folder, *engine)
    process.send(signal.SIGTERM, ranks=[1])  # one of them is enough
    assert process.wait().returncode == 0
    (saved,) = checkpoints(folder / "checkpoints")
    info = json.loads((saved / "checkpoint.json").read_text())
    assert info["step"] == max(losses(folder))
    assert info["samples_consumed"] == info["step"] * 8


@pytest.mark.parametrize("engine", [[], ["--engine.zero_stage", "2"]], ids=["fsdp", "zero-2"])
def test_non_finite_steps_are_skipped_then_fatal(settings, tmp_path, engine):
    folder = tmp_path / "diverging"
    done = run(
        "launch/train.py",
        *shlex.split(
            f"--config {settings} --run.dir {folder} --optim.lr 1e30 --optim.warmup_steps 0 "
            "--train.max_skipped_steps 3 --checkpoint.every 1"
        ),
        *engine,
        expect=1,
    )
    assert "3 steps in a row had a non-finite loss" in done.stderr
    assert "Traceback" not in done.stderr
    skipped = losses(folder, "optim/skipped_steps")
    assert max(skipped.values()) >= 1
    assert checkpoints(folder / "checkpoints")


def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path):
    folder = tmp_path / "infinite"
    done = run(
        "launch/train.py",
        *shlex.split(
            f"--config {settings} --run.dir {folder} --optim.lr 1e38 --optim.warmup_steps 0 --checkpoint.every 1"
        ),
        "--optim.lr_scale",
        "{'*norm*': 1000}",
        processes=2,
        expect=1,
    )
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "step 1: " in said and "hold values that are not finite (" in said and "none is saved" in said
    assert "Traceback" not in done.stderr and not list((folder / "checkpoints").iterdir())


def test_a_run_whose_folder_is_deleted_saves_and_says_so(settings, tmp_path):
    folder = tmp_path / "deleted"
    process = start_training(settings, folder)
    shutil.rmtree(folder)
    done = process.wait()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{folder} was deleted or renamed: saving" in done.stderr
    (saved,) = checkpoints(folder / "checkpoints")
    assert f"step {int(saved.name[5:])} is saved in {folder / 'checkpoints'}" in done.stderr
    run(
        "launch/train.py",
        *shlex.split(f"--config {settings} --run.dir {folder} --resume auto --train.steps {int(saved.name[5:]) + 1}"),
        processes=2,
    )


def test_the_death_of_a_process_is_called_that(settings, tmp_path):
    folder = tmp_path / "bereft"
    process = start_training(settings, folder)
    process.send(signal.SIGKILL, ranks=[1])
    deadline = time.time() + 240
    while process.is_running(0):
        assert time.time() < deadline
        time.sleep(0.1)
    done = process.wait()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "rank 0 on " in said and " lost another process of the run" in said and "--resume auto" in said
    assert "Traceback" not in done.stderr


def test_a_password_is_in_nothing_that_a_run_leaves(settings, tmp_path):
    folder = tmp_path / "secret"
    uri = "http://ann:hush-hush@127.0.0.1:9/mlflow?token=mum-mum"
    done = run(
        "launch/train.py",
        *shlex.split(
            f"--config {settings} --run.dir {folder} --train.steps 2 --tracking.mlflow true --tracking.uri {uri}"
        ),
        cwd=tmp_path,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_HTTP_REQUEST_TIMEOUT="1",
    )
    left = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    left["the terminal"] = (done.stdout + done.stderr).encode()
    assert not [name for name, text in left.items() for word in (b"hush", b"mum", b"ann:") if word in text]
    assert b"127.0.0.1:9" in left[str(folder / "config.yaml")]
    again = run("launch/train.py", "--config", str(folder / "config.yaml"), "--resume", "auto", expect=2)
    assert "tracking.uri=http://***@127.0.0.1:9/mlflow?token=*** has its secrets hidden" in again.stderr
    assert "--tracking.uri" in again.stderr and "Traceback" not in again.stderr


MISTAKES = {
    "wrong key": (["--train.stepz", "3"], "stepz"),
    "wrong type": (["--train.steps", "many"], "train.steps"),
    "shortened option": (["--train.step", "3"], "did you mean --train.steps"),
    "impossible value": (["--train.steps", "-1"], "train.steps=-1"),
    "missing data": (["--data.path", "nowhere/at/all"], "nowhere/at/all"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "small vocabulary": (["--model.vocab_size", "100"], "--model.vocab_size 26"),
    "unwritable folder": (["--run.dir", "/proc/nothing"], "/proc/nothing"),
    "missing checkpoint": (["--resume", "nowhere"], "nowhere"),
    "long sequence": (["--data.seq_len", "4096"], "data.seq_len=4096"),
    "impossible layout": (["--parallel.expert_parallel", "3"], "parallel.expert_parallel=3 must divide"),
    "impossible balancing": (["--loss.selection_bias_rate", "0.1"], "--model.router_selection_bias true"),
    "contradicting DeepSpeed": (
        ["--engine.kind", "deepspeed", "--engine.deepspeed", '{"gradient_clipping": 7}'],
        "gradient_clipping=7 contradicts optim.clip_norm, which gives 1.0; leave gradient_clipping out",
    ),
    "impossible stage": (["--engine.kind", "deepspeed", "--engine.zero_stage", "0"], "engine.zero_stage=0 is not"),
    "impossible layout with DeepSpeed": (
        ["--engine.kind", "deepspeed", "--parallel.expert_parallel", "3"],
        "parallel.expert_parallel=3 must divide",
    ),
    "impossible offload": (
        [
            "--engine.kind",
            "deepspeed",
            "--engine.deepspeed",
            str(ROOT / "configs/deepspeed/zero3_offload.json"),
            "--model.vocab_size",
            "2000000000",
        ],
        "GiB are free; use more machines, or do not offload",
    ),
    "grouped_gemm in fp32": (
        ["--parallel.expert_gemm", "grouped_gemm"],
        "parallel.expert_gemm=grouped_gemm computes in bf16 only; set --train.precision bf16",
    ),
    "unaligned experts": (
        ["--parallel.expert_gemm", "grouped_mm", "--model.intermediate_size", "30"],
        "parallel.expert_gemm=grouped_mm needs rows of whole 16 bytes: sizes in multiples of 4",
    ),
    "nothing recomputed": (["--train.keep_all_to_all", "true"], "needs --train.activation_checkpointing 1 or more"),
    "nothing exchanged": (
        ["--train.keep_all_to_all", "true", "--train.activation_checkpointing", "1"],
        "train.keep_all_to_all=True has nothing to keep: with parallel.expert_parallel=1",
    ),
    "two kinds of data": (["--data.sources", "[{path: a}]"], "and data.sources are both given"),
    "impossible sampling": (["--sampling.temperature", "-1"], "sampling.temperature=-1"),
}


def test_no_run_is_named():
    """The defaults of the model are gpt-oss-20b's, which would fill the memory of most machines before any word."""
    done = run("launch/train.py", "--train.steps", "2", expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: no run is named") and "give --config FILE" in line


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_clear_line(settings, name):
    options, expected = MISTAKES[name]
    done = run("launch/train.py", "--config", str(settings), *options, expect=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and expected in lines[0], done.stderr
    assert not (settings.parent / "tiny").exists()


def test_a_mistake_of_two_processes_is_said_once(settings):
    done = run("launch/train.py", "--config", str(settings), "--resume", "nowhere", processes=2, expect=2)
    assert done.stderr.count("train.py: no complete checkpoint in nowhere") == 1
    done = run("launch/train.py", "--config", str(settings), "--run.dir", "/proc/nothing", processes=2, expect=2)
    assert done.stderr.count("train.py: ") == 1 and "/proc/nothing" in done.stderr


def test_truncated_shard_is_refused(settings, tmp_path, corpus):
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    shard = sorted(broken.rglob("*.bin"))[0]
    with open(shard, "r+b") as file:
        file.truncate(os.path.getsize(shard) // 2)
    done = run("launch/train.py", "--config", str(settings), "--data.path", str(broken), expect=2)
    assert shard.name in done.stderr and "Traceback" not in done.stderr


def test_flipped_bytes_are_said_once_by_any_number_of_processes(settings, tmp_path, corpus):
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    shard = sorted(broken.rglob("*.bin"))[-1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    options = ["--config", str(settings), "--data.path", str(broken)]
    done = run("launch/train.py", *options, processes=2, expect=2)
    assert done.stderr.count(f"{shard.name}: content differs") == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("train.py: ") == 2 and "train.py: comparing " in done.stderr
    assert not (settings.parent / "tiny").exists()


def test_a_mixture_trains_and_its_change_is_recorded(settings, tmp_path, corpus):
    """Interrupted and resumed it is as if nothing had happened; another mixture needs a word, and is written down."""
    other, third = tmp_path / "letters", tmp_path / "more"
    for path in (other, third):
        path.mkdir()
        write_dataset(path, {"train": [40] * 60, "validation": [40] * 9}, seed=len(path.name))
    options = ["--config", str(settings), "--data.path", "null", "--train.deterministic", "true", "--data.workers", "2"]
    mixed = f"[{{path: {corpus}, weight: 3, name: words}}, {{path: {other}, weight: 1, max_epochs: 0.2}}]"
    options += ["--data.sources", mixed]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(
        "launch/train.py",
        *options,
        *shlex.split(
            f"--run.dir {whole} --checkpoint.keep 0 --tracking.mlflow true --tracking.uri sqlite:///{tmp_path}/mlflow.db"
        ),
    )
    log = (whole / "log.txt").read_text()
    assert "letters is used up after 0.2 epochs; now words 100.00%" in log
    rows = read_metrics(whole)
    assert rows[-1]["metrics"]["data/letters_epochs"] == pytest.approx(0.2, abs=0.02)
    first, last = ({n: losses(whole, f"loss/val{n}")[s] for n in ("", "_words", "_letters")} for s in (0, 12))
    for row in (first, last):
        assert row[""] == pytest.approx(0.75 * row["_words"] + 0.25 * row["_letters"])
    middle = ["--resume", str(whole / "checkpoints" / "step_00000004"), "--run.dir", str(parts)]
    run("launch/train.py", *options, *middle, "--data.workers", "0")
    assert losses(parts) == {step: loss for step, loss in losses(whole).items() if step > 4}

    more = [
        *options,
        *shlex.split(f"--run.dir {whole} --resume auto --train.steps 16"),
        "--data.sources",
        mixed[:-1] + f", {{path: {third}, weight: 4}}]",
    ]
    done = run("launch/train.py", *more, expect=2)
    assert "more is new" in done.stderr and "--data.change_mixture true" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    run("launch/train.py", *more, "--data.change_mixture", "true")
    assert "the data changed: weight of words was 0.75, now 0.375" in (whole / "log.txt").read_text()
    newest = checkpoints(whole / "checkpoints")[-1]
    (change,) = json.loads((newest / "checkpoint.json").read_text())["data"]["mixture"]["history"]
    assert change["step"] == 12 and "more is new" in change["changed"]
    starts = [json.loads(line) for line in (whole / "tracking" / "journal.jsonl").read_text().splitlines()]
    assert "more is new" in [s for s in starts if s["op"] == "run"][-1]["tags"]["data.change.1"]
    again = [*more[:-4], *more[-2:], "--train.steps", "17"]  # the change needs no second permission
    done = run("launch/train.py", *again, "--tracking.report", "true")
    page = (whole / "report.html").read_text()
    assert f"the run's report is {whole / 'report.html'}" in done.stderr and '<p class="subtitle">finished' in page
    assert page.count("more is new") >= 2, "in the data's changes, and in the events"
    changed, last = (row["metrics"] for row in read_metrics(whole) if row["step"] in (12, 17))
    seen, total = changed["progress/tokens"], last["progress/tokens"]
    for name in ("words", "letters"):  # the shares that are recorded begin anew with the change
        tokens = changed[f"data/{name}_share"] * seen + last[f"data/{name}_share"] * (total - seen)
        assert f'<td class="number">{100 * tokens / total:.2f} %</td>' in page, name


@pytest.mark.parametrize("packing", ["best_fit", "varlen"])
def test_packed_documents_train_alike_on_one_process_and_two(settings, tmp_path, packing):
    """Ranks bring different numbers of tokens, yet every loss is that of the whole batch."""
    lengths = np.random.default_rng(0).integers(2, 60, 150)
    data = write_dataset(tmp_path, {"train": lengths, "validation": lengths[:20]})
    options = shlex.split(f"--config {settings} --data.path {data} --data.packing {packing} --validation.every 10")
    run("launch/train.py", *options, "--run.dir", str(tmp_path / "one"), "--train.micro_batch_size", "4")
    run("launch/train.py", *options, "--run.dir", str(tmp_path / "two"), processes=2)
    assert sorted(losses(tmp_path / "one")) == list(range(1, 13))
    for name in ("loss/train", "loss/aux", "loss/z", "loss/val", "optim/grad_norm", "progress/tokens"):
        a, b = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
        assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) <= 1e-5, name


def test_folder_with_checkpoints_is_not_overwritten(settings, tmp_path):
    options = ["--config", str(settings), "--train.steps", "2", "--validation.every", "0"]
    run("launch/train.py", *options)
    done = run("launch/train.py", *options, expect=2)
    assert "--resume auto" in done.stderr
