"""Spikes of the loss: when one is found, and the run that goes back, skips its samples and goes on."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import open_dataset
from gptoss_dist import load_pretrained
from gptoss_dist.checkpoint import CheckpointInfo, checkpoints, read_skipped
from gptoss_dist.config import SpikesConfig
from gptoss_dist.tracking.recorded.run import read_run
from gptoss_dist.tracking.tracker import read_resume_steps
from gptoss_dist.train.faults import SpikeGuard
from tests.support.ranks import losses, run

SAMPLES = 8
"""Of a step."""
T = 48
OBSERVED = "tests/support/train_observed.py"


def guard_after(values, first=1, recent=(), **settings):
    guard = SpikeGuard(SpikesConfig(**({"max_rewinds": 1, "window": 8} | settings)), recent)
    for step, value in enumerate(values, first):
        guard.observe(step, value, SAMPLES * step)
        if guard.found:
            break
    return guard


HEALTHY = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0, 3.02, 2.98]


@pytest.mark.parametrize(
    ("after", "spike"),
    [
        ([9.0], (9, 9)),  # far above
        ([3.9, 3.9, 3.9], (9, 11)),  # above, three times
        ([3.9, 3.9, 3.0, 3.9, 3.9, 3.9], (12, 14)),  # in a row
        ([3.9, math.nan, 3.9], (9, 10)),  # what is not finite is far above
        ([None], (9, 9)),
        ([3.3, 3.3, 3.3, 3.3, 3.3], None),  # within eight deviations
        ([2.0, 1.0, 0.5, 0.5, 0.5], None),  # it may fall as it likes
        ([3.9, 3.9, 3.0, 3.9, 3.9], None),
    ],
)
def test_what_a_spike_is(after, spike):
    found = guard_after(HEALTHY + after).found
    assert (found and (found.first_step, found.last_step)) == spike
    if found:  # the step before it too, and high losses before that
        begin = 8 if after[0] == 3.9 and spike[0] > 9 else spike[0] - 2
        assert found.samples == (SAMPLES * begin, SAMPLES * spike[1])
        assert f"step{'s' if len(after) > 1 and spike[1] > spike[0] else ''} {spike[0]}" in str(found)


def test_nothing_is_found_too_early_or_where_it_is_off():
    assert guard_after([*HEALTHY[:7], 9.0]).found is None
    off = guard_after(HEALTHY + [9.0] * 9, max_rewinds=0)
    assert off.found is None and off.recent == []
    # A loss that does not move is not high for a rounding error.
    assert guard_after([3.0] * 8 + [3.001] * 9).found is None


def test_a_healthy_run_has_no_spike():
    """Falling losses with noise of 1 to 10 %, with the settings that a user gets by switching it on."""
    for seed in range(8):
        generator = np.random.default_rng(seed)
        noise = generator.uniform(0.01, 0.1)
        values = (2 + 8 * np.exp(-np.arange(2000) / 400)) * (1 + noise * generator.standard_normal(2000))
        assert guard_after(values.tolist(), window=64).found is None, (seed, noise)


def test_a_resumed_guard_finds_what_the_interrupted_one_would_have_found():
    generator = np.random.default_rng(0)
    for _ in range(200):
        values = generator.choice([2.9, 3.0, 3.1, 3.05, 3.9, 9.0], 40, p=[0.25, 0.25, 0.2, 0.1, 0.17, 0.03]).tolist()
        settings = {"before": int(generator.integers(0, 8)), "steps": int(generator.integers(1, 4))}
        whole = guard_after(values, **settings)
        stop = int(generator.integers(0, whole.found.last_step if whole.found else 40))
        recent = json.loads(json.dumps(guard_after(values[:stop], **settings).recent))
        assert guard_after(values[stop:], stop + 1, recent, **settings).found == whole.found


def poison(folder: Path, positions) -> None:
    """Replace the samples at positions of a dataset's training order by random bytes."""
    dataset = open_dataset(folder, seq_len=T, seed=0)
    (file,) = dataset.files
    tokens = np.memmap(file.path, file.dtype, "r+", offset=file.offset)
    generator = np.random.default_rng(0)
    for index in dataset.order(np.asarray(positions)):
        tokens[index * T : index * T + T + 1] = generator.integers(0, 256, T + 1)


@pytest.fixture
def poisoned(corpus, tmp_path):
    """The corpus with positions of steps replaced, the number of the step counted from 1."""

    def poisoned(*steps: int) -> Path:
        shutil.copytree(corpus, tmp_path / "poisoned")
        poison(tmp_path / "poisoned", [p for n in steps for p in range(SAMPLES * (n - 1), SAMPLES * n)])
        return tmp_path / "poisoned"

    return poisoned


def options(settings, data, folder, steps, micro_batch_size=4, **changes):
    values = {
        "data.path": data,
        "data.verify": "never",
        "run.dir": folder,
        "train.steps": steps,
        "optim.lr": 0.02,
        "train.micro_batch_size": micro_batch_size,
        "validation.every": 0,
        "checkpoint.every": 5,
        "checkpoint.keep": 4,
        "spikes.max_rewinds": 2,
        "spikes.window": 8,
        "spikes.margin": 3,
        "loss.router_jitter": 0.01,
        "train.deterministic": "true",
    }
    given = (x for key, value in (values | changes).items() for x in (f"--{key}", str(value)))
    return ["--config", str(settings), *given]


def rows_read(prefix: Path, ranks: int) -> list[tuple[int, list]]:
    """The place after each step that was read, and its samples in their global order."""
    files = [Path(f"{prefix}.{rank}").read_text() for rank in range(ranks)]
    lines = [[json.loads(line) for line in file.splitlines()] for file in files]
    return [
        (
            step[0]["place"],
            [row for batches in zip(*(rank["rows"] for rank in step)) for rows in batches for row in rows],
        )
        for step in zip(*lines)
    ]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_pretrained(folder).named_parameters())


@pytest.mark.distributed
def test_it_goes_back_skips_and_ends_as_if_nothing_had_been(settings, corpus, poisoned, tmp_path):
    """Two ranks; MLflow shows it; and one rank that resumes any checkpoint reads the same samples."""
    data, whole, spiked, disturbed = poisoned(22, 23), tmp_path / "whole", tmp_path / "spiked", tmp_path / "disturbed"
    more = {"micro_batch_size": 2, "validation.every": 45, "validation.samples": 64, "checkpoint.keep": 0}
    mlflow = {"tracking.mlflow": "true", "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    run("launch/train.py", *options(settings, corpus, whole, 45, **more), processes=2)
    run("launch/train.py", *options(settings, data, disturbed, 45, **(more | {"spikes.max_rewinds": 0})), processes=2)
    done = run(
        OBSERVED, *options(settings, data, spiked, 45, **more, **mlflow), processes=2, ROWS=str(tmp_path / "two")
    )
    (entry,) = read_skipped(spiked / "checkpoints")
    first, end = SAMPLES * 20, SAMPLES * 24  # one step before the spike, and two after the one that showed it
    assert (entry["first"], entry["end"], entry["step"], entry["rewound_to"]) == (first, end, 22, 15)
    told = f"back to the checkpoint of step 15; samples {first} to {end - 1} of the data are skipped from now on"
    assert done.stderr.count(told) == 1 and (spiked / "log.txt").read_text().count(told) == 1
    assert (spiked / "checkpoints" / "step_00000020.superseded").is_dir() and read_resume_steps(spiked) == [15]
    assert losses(spiked, "faults/rewinds") == {15: 1.0}
    assert losses(spiked, "faults/skipped_samples") == {15: end - first}

    # As good as undisturbed, which is more than can be said of the run that went on.
    final = {folder.name: losses(folder, "loss/val")[45] for folder in (whole, spiked, disturbed)}
    assert final["disturbed"] > 1.02 * final["whole"], final
    assert final["spiked"] == pytest.approx(final["whole"], rel=0.02), final
    assert len(losses(spiked)) == 45 and max(list(losses(spiked).values())[8:]) < 4 < max(
        list(losses(disturbed).values())[8:]
    )

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (shown,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert told in shown.data.tags["spike.1"] and shown.data.metrics["faults/rewinds"] == 1
    assert shown.data.metrics["faults/skipped_samples"] == end - first and shown.info.status == "FINISHED"
    note = shown.data.tags["mlflow.note.content"]
    assert "- went back at step 22" in note and told in note and shown.data.tags["state"] == "finished"
    points = [(point.step, point.value) for point in client.get_metric_history(shown.info.run_id, "events/rewind")]
    assert {(22, 1.0), (15, 1.0)} <= set(points) and points[-1] == (45, 1.0)
    events = [event.kind for event in read_run(spiked).events if event.kind != "checkpoint"]
    assert events == ["start", "rewind", "end"]

    # What was read after going back is the order without the range; whoever goes on from there reads it too.
    dataset = open_dataset(data, seq_len=T, seed=0)
    kept = [p for p in range(1000) if not first <= p < end]
    read = rows_read(tmp_path / "two", 2)
    branch = read[next(n for n in range(1, len(read)) if read[n][0] < read[n - 1][0]) :]
    for number, (place, rows) in enumerate(branch, 15):
        positions = np.array(kept[SAMPLES * number : SAMPLES * (number + 1)])
        assert rows == dataset.micro_batch(dataset.order(positions))["input_ids"].tolist(), number
        assert place == positions[-1] + 1
    # That checkpoint does not name the range, but the file beside it does.
    before = spiked / "checkpoints" / "step_00000015"
    assert (
        CheckpointInfo.read(before).data.skipped
        == []
        != CheckpointInfo.read(before.with_name("step_00000025")).data.skipped
    )
    for size, accumulation in ((4, 2), (3, 1)):
        prefix = tmp_path / f"one-{size}"
        more = {"train.gradient_accumulation": accumulation, "resume": before}
        run(OBSERVED, *options(settings, data, tmp_path / prefix.name, 31, size, **more), ROWS=str(prefix))
        read = rows_read(prefix, 1)[:16]
        found, expected = ([row for _, rows in steps for row in rows] for steps in (read, branch))
        assert len(found) == 16 * size * accumulation and found == expected[: len(found)]
        assert read[-1][0] > end, "it has come past the range"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "moments"),
    [
        pytest.param({}, ("recorded", "trained"), id="fsdp"),
        pytest.param({}, ("restored",), id="fsdp-restored", marks=pytest.mark.slow),
        pytest.param({"engine.zero_stage": 2}, ("recorded",), id="zero-2", marks=pytest.mark.slow),
        pytest.param({"engine.zero_stage": 3}, ("recorded",), id="zero-3", marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_goes_back_the_skip_is_not_lost(settings, poisoned, tmp_path, engine, moments):
    """The run in place, and the one whose process was killed and resumed, end in the same bits, on either engine."""
    data, whole = poisoned(14), tmp_path / "whole"
    run("launch/train.py", *options(settings, data, whole, 20, **engine))
    assert len(read_skipped(whole / "checkpoints")) == 1 and max(list(losses(whole).values())[8:]) < 5
    for moment in moments:
        folder, prefix = tmp_path / moment, tmp_path / f"{moment}-rows"
        again = [*options(settings, data, folder, 20, **engine), "--resume", "auto"]
        run(OBSERVED, *again, expect=-signal.SIGKILL, KILL_AT=moment)
        assert (folder / "checkpoints" / "step_00000010").is_dir()
        run(OBSERVED, *again, ROWS=str(prefix))
        assert read_skipped(folder / "checkpoints") == read_skipped(whole / "checkpoints")
        places = [place for place, _ in rows_read(prefix, 1)]
        assert places[:4] == [88, 96, 136, 144], "the range 96 to 127 is skipped, once"
        assert losses(folder) == losses(whole) and losses(folder, "faults/rewinds") == {10: 1.0}
        expected, found = state(whole), state(folder)
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items()), moment


@pytest.mark.distributed
def test_without_a_checkpoint_it_goes_on_and_after_too_many_rewinds_it_ends(settings, poisoned, tmp_path):
    folder = tmp_path / "run"
    given = options(settings, poisoned(13, 26, 40), folder, 60, **{"spikes.max_rewinds": 1, "spikes.margin": 9})
    done = run("launch/train.py", *given, expect=1)
    assert done.stderr.count("there is no checkpoint from 9 steps or more before it (spikes.margin)") == 1
    assert done.stderr.count("back to the checkpoint of step 15; samples 192 to 223") == 1
    assert (
        "after 1 rewinds (spikes.max_rewinds=1): inspect the samples" in done.stderr and "Traceback" not in done.stderr
    )
    assert len(read_skipped(folder / "checkpoints")) == 1 and checkpoints(folder / "checkpoints")
    # The remedy that it names.
    done = run("launch/train.py", *given, "--spikes.max_rewinds", "2", "--resume", "auto")
    assert len(read_skipped(folder / "checkpoints")) == 2 and losses(folder, "faults/rewinds")[25] == 2
    assert CheckpointInfo.read(checkpoints(folder / "checkpoints")[-1]).data.skipped[0]["first"] == 192
