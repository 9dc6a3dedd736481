"""The checkpoint store: complete or absent, on any number of ranks, without pickle."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gptoss_dist import checkpoint


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(5, 3, generator=generator),
        "model.b": torch.randn(7, generator=generator).bfloat16(),
        "optim.step": torch.tensor([3.0]),
    }


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in example().items()}


def test_round_trip_keep_and_resolve(tmp_path, monkeypatch):
    def poisoned(*_, **__):
        raise AssertionError("a checkpoint was pickled")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, poisoned)
    run = tmp_path / "run"
    for step in (1, 2, 3):
        done = checkpoint.save(run / "checkpoints", step, example(), {"note": "x"}, keep=2)
    assert done.name == "step_00000003"
    assert [p.name for p in checkpoint.checkpoints(run / "checkpoints")] == ["step_00000002", "step_00000003"]
    for path in (run, run / "checkpoints", done):
        assert checkpoint.resolve(path) == done
    info = checkpoint.read_info(done)
    assert (info["step"], info["note"]) == (3, "x")
    state = blank()
    checkpoint.load_state(done, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in example().items())
    weights = {"a": torch.zeros(5, 3), "b": torch.zeros(7, dtype=torch.bfloat16)}
    checkpoint.load_weights(done, weights)
    assert torch.equal(weights["a"], example()["model.a"])


def test_random_generators_are_restored(tmp_path):
    done = checkpoint.save(tmp_path, 1, example(), {})
    draw = lambda: (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: E731
    first = draw()
    assert draw() != first
    assert checkpoint.restore_rng(done, 0)
    assert draw() == first
    assert not checkpoint.restore_rng(done, 5)


def test_unfinished_checkpoints_are_never_taken(tmp_path):
    done = checkpoint.save(tmp_path, 1, example(), {})
    (tmp_path / "step_00000002.tmp").mkdir()
    (tmp_path / "step_00000003").mkdir()
    assert checkpoint.checkpoints(tmp_path) == [done]
    (done / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.resolve(tmp_path)
    # a stale unfinished directory does not stop the next save
    assert checkpoint.save(tmp_path, 2, example(), {}).is_dir()
    assert not (tmp_path / "step_00000002.tmp").exists()


def test_a_failed_save_leaves_the_old_ones(tmp_path, monkeypatch):
    done = checkpoint.save(tmp_path, 1, example(), {}, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, 2, example(), {}, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [done]


def test_misfits_are_listed(tmp_path):
    done = checkpoint.save(tmp_path, 1, example(), {})
    state = blank()
    state["model.a"] = torch.zeros(4, 3)
    state["model.new"] = state.pop("model.b")
    with pytest.raises(ValueError) as error:
        checkpoint.load_state(done, state)
    for part in ("model.new is missing", "model.b is not expected", "model.a has shape (5, 3), expected (4, 3)"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"model\.b is not expected"):
        checkpoint.load_weights(done, {"a": torch.zeros(5, 3)})


def test_another_branch_does_not_take_old_checkpoints_for_its_own(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, example(), {"branch": "old"})
    assert [p.name for p in checkpoint.set_aside(tmp_path, after=1)] == [
        "step_00000002.superseded",
        "step_00000003.superseded",
    ]
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    # and a save at a step that exists replaces it
    done = checkpoint.save(tmp_path, 1, example(), {"branch": "new"})
    assert checkpoint.read_info(done)["branch"] == "new"
    assert not list(tmp_path.glob("*.tmp*"))


def test_damage_is_one_clear_error(tmp_path):
    done = checkpoint.save(tmp_path, 1, example(), {})
    (shard,) = done.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_state(done, blank())
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_weights(done, {"a": torch.zeros(5, 3), "b": torch.zeros(7)})
    (done / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_info(done)
    (done / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.read_info(done)
