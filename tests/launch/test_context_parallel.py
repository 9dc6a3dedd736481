"""Runs whose sequences are split over processes, as a user starts them."""

import json
import shlex

import pytest

from gptoss_dist.config import load_config
from launch.plan import main
from tests.support.ranks import losses, run

pytestmark = pytest.mark.distributed


def plan(capsys, *words: str) -> str:
    """Run the planner in this process; return what it printed."""
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_a_run_goes_on_with_another_degree(settings, tmp_path):
    """Losses, validation losses, tokens and the place in the data are those of one process, whoever goes on."""
    options = shlex.split(
        f"--config {settings} --train.steps 8 --validation.every 4 --checkpoint.keep 0 --data.seq_len 47 "
        "--data.document_mask true --sampling.every 4 --sampling.prompts '[a]'"
    )

    def train(name: str, processes: int, more: str) -> None:
        run("launch/train.py", *options, *shlex.split(f"--run.dir {tmp_path / name} {more}"), processes=processes)

    checkpoint = "checkpoints/step_00000004"
    train("one", 1, "")
    split = "--parallel.context_parallel 2 --parallel.expert_parallel 2 --train.micro_batch_size 1"
    train("split", 4, split)
    train("together", 2, f"--parallel.context_parallel 2 --resume {tmp_path / 'split' / checkpoint}")
    train("apart", 4, f"--parallel.context_parallel 4 --resume {tmp_path / 'one' / checkpoint}")
    for name, steps in (("split", range(1, 9)), ("together", range(5, 9)), ("apart", range(5, 9))):
        folder = tmp_path / name
        for metric in ("loss/train", "loss/aux", "loss/z", "loss/val", "optim/grad_norm", "progress/tokens"):
            found, one = losses(folder, metric), losses(tmp_path / "one", metric)
            assert [step for step in found if step] == [step for step in one if step in steps] and found, metric
            assert all(found[step] == pytest.approx(one[step], rel=3e-6) for step in found), (name, metric)
        last = json.loads((folder / "checkpoints/step_00000008/checkpoint.json").read_text())
        assert last["samples_consumed"] == 32 and last["tokens"] == 32 * 47
    assert "context 2; 4 samples per step" in (tmp_path / "split" / "log.txt").read_text()


def test_documents_of_any_length(settings, tmp_path):
    """Each micro-batch has another number of tokens, which chunks do not divide."""
    options = f"--config {settings} --train.steps 4 --validation.every 2 --data.packing varlen"
    run("launch/train.py", *shlex.split(f"{options} --run.dir {tmp_path / 'one'}"))
    split = f"{options} --run.dir {tmp_path / 'two'} --parallel.context_parallel 2"
    run("launch/train.py", *shlex.split(split), processes=2)
    for metric in ("loss/train", "loss/val", "loss/aux", "progress/tokens", "optim/grad_norm"):
        one, two = (losses(tmp_path / name, metric) for name in ("one", "two"))
        assert one.keys() == two.keys() and len(one) >= 3, metric
        assert all(one[step] == pytest.approx(two[step], rel=3e-6) for step in one), metric


def test_a_change_of_the_degree_is_named(settings, tmp_path):
    """Twice the processes for each sample: a step has half as many samples."""
    options = shlex.split(f"--config {settings} --train.steps 4 --validation.every 0")
    run("launch/train.py", *options, processes=2)
    done = run(
        "launch/train.py",
        *options,
        *shlex.split("--train.steps 5 --parallel.context_parallel 2 --resume auto"),
        processes=2,
    )
    assert "changed: parallel.context_parallel 1 -> 2" in done.stderr
    assert "a step has 4 samples instead of 8" in done.stderr


def test_what_does_not_fit_is_refused(settings, tmp_path):
    arguments = shlex.split(f"--config {settings} --parallel.context_parallel 4")
    done = run("launch/train.py", *arguments, processes=2, expect=2)
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert "parallel.context_parallel=4 must divide the 2 processes of a shard group" in said
    assert "Traceback" not in done.stderr and not (tmp_path / "tiny").exists()


def test_samples_of_fewer_tokens_than_parts_are_refused(settings):
    with pytest.raises(ValueError, match=r"context_parallel=30 splits .* 60 parts, and data\.seq_len=48 has fewer"):
        load_config(settings, overrides={"parallel.context_parallel": 30})


def test_a_plan_counts_groups(settings, capsys):
    """A process computes half of each sample, sends what a trace says, and no search is made for the degree."""
    options = f"--config {settings} --gpus 4 --gpu h100-80gb --train.precision bf16 --train.activation_checkpointing 1"
    whole, split = (
        plan(capsys, *options.split(), "--parallel.context_parallel", degree, "--data.seq_len", "64")
        for degree in ("1", "2")
    )
    assert "2 x 2 accumulated x 4 processes x 64 tokens = 1,024 tokens per step" in whole
    assert "2 x 2 accumulated x 2 groups of 2 processes x 64 tokens = 512 tokens per step" in split
    assert "context 2" in split and "all-to-all" in split and "all-to-all" not in whole
    assert main([*options.split(), "--search", "--parallel.context_parallel", "2"]) == 2
    assert "--search looks for layouts without context parallelism" in capsys.readouterr().err
