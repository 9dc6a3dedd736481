"""A dry run as a user starts it."""

import pytest

from tests.support.ranks import run

pytestmark = pytest.mark.distributed


def test_dry_run_prints_the_plan_and_what_is_missing_once():
    config = "configs/pretrain_502m_a100.yaml"
    batch = "--train.micro_batch_size 1 --train.gradient_accumulation 16 --train.activation_checkpointing 1"
    done = run("launch/train.py", "--config", config, *batch.split(), "--dry-run", processes=2)
    for expected in (
        "501,836,640",
        "247,032,672",
        "131,072 tokens per step",
        "7,995,392,000",
        "process, GiB",
        ": fits",
    ):
        assert done.stdout.count(expected) == 1, done.stdout
    for source in ("fineweb_edu", "fineweb", "stack_python", "open_web_math", "arxiv"):
        command = f"python -m data_pipeline.prepare --config configs/data/pretrain_502m/{source}.yaml"
        assert done.stdout.count(f"NOT READY: data/pretrain_502m/{source}: ") == 1
        assert done.stdout.count(f"make one with `{command}`") == 1, done.stdout


def test_dry_run_refuses_what_no_machine_holds_and_says_what_fits(settings):
    """Petabytes of activations: the plan, one line that names the setting, and a batch that a second run takes."""
    options = f"--config {settings} --dry-run --train.micro_batch_size {2**20} --model.intermediate_size 16384"
    done = run("launch/train.py", *options.split(), processes=2, expect=2)
    assert "DOES NOT FIT" in done.stdout and done.stderr.count("\n") == 1, done.stderr
    assert f"train.micro_batch_size={2**20} with train.activation_checkpointing=0 needs " in done.stderr
    remedy = done.stderr.partition("; ")[2].partition(" would fit")[0].split()
    assert remedy[::2] == [
        f"--train.{name}" for name in ("micro_batch_size", "gradient_accumulation", "activation_checkpointing")
    ]
    size, accumulation, every = map(int, remedy[1::2])
    assert size * accumulation == 2**20 * 2 and every == 1
    run("launch/train.py", *options.split(), *remedy, processes=2)
    larger = ["--train.micro_batch_size", str(2 * size), "--train.gradient_accumulation", str(accumulation // 2)]
    run("launch/train.py", *options.split(), *remedy, *larger, processes=2, expect=2)
