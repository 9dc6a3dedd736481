"""The checkpoint store: complete or absent, on any number of ranks, without pickle."""

import json
import math
import os
import pickle
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gptoss_dist import checkpoint
from gptoss_dist.checkpoint import saver, store


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


def save(folder, step, info=None, **keep) -> Path:
    return checkpoint.save(folder, step, example(), info or {}, keep=checkpoint.Retention(**keep))


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in example().items()}


def test_round_trip_keep_and_resolve(tmp_path, monkeypatch):
    def poisoned(*_, **__):
        raise AssertionError("a checkpoint was pickled")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, poisoned)
    run = tmp_path / "run"
    for step in (1, 2, 3):
        done = save(run / "checkpoints", step, info={"note": "x"}, newest=2)
    assert done.name == "step_00000003"
    assert [p.name for p in checkpoint.checkpoints(run / "checkpoints")] == ["step_00000002", "step_00000003"]
    for path in (run, run / "checkpoints", done):
        assert checkpoint.resolve(path) == done
    info = checkpoint.read_info(done)
    assert (info["step"], info["note"]) == (3, "x")
    state = blank()
    checkpoint.load_state(done, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in example().items())


def test_random_generators_are_restored(tmp_path):
    done = save(tmp_path, 1)
    draw = lambda: (random.random(), np.random.rand(), torch.rand(3).tolist())  # noqa: E731
    first = draw()
    assert draw() != first
    assert checkpoint.restore_rng(done, 0)
    assert draw() == first
    assert not checkpoint.restore_rng(done, 5)


def test_unfinished_checkpoints_are_never_taken(tmp_path):
    done = save(tmp_path, 1)
    (tmp_path / "step_00000002.tmp").mkdir()
    (tmp_path / "step_00000003").mkdir()
    assert checkpoint.checkpoints(tmp_path) == [done]
    said = []
    assert checkpoint.resolve(tmp_path, said.append) == done
    assert len(said) == 1 and "step_00000003 is damaged: checkpoint.json is missing" in said[0]
    (done / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match="no intact checkpoint"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.resolve(tmp_path / "nothing")
    # a stale unfinished directory does not stop the next save
    assert save(tmp_path, 2).is_dir()
    assert not (tmp_path / "step_00000002.tmp").exists()


def test_a_failed_save_is_tried_again_then_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "RETRY_AFTER_S", (0.01, 0.01))
    done = save(tmp_path, 1, newest=1)
    fsync, left = os.fsync, [4]

    def full(descriptor):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    for asynchronous in (False, True):
        left[0] = 100
        failing = checkpoint.Saver(tmp_path, keep=checkpoint.Retention(newest=1), asynchronous=asynchronous)
        failing.save(2, example(), {})
        failing.wait()
        said = failing.messages()
        assert len(said) == 3 and all("No space left on device; earlier checkpoints are intact" in m for m in said)
        assert "trying again in 0.01 s" in said[0] and "training goes on without it" in said[2]
        assert failing.messages() == [] and checkpoint.checkpoints(tmp_path) == [done]
        with pytest.raises(OSError, match="No space left"):
            failing.close()
        assert not list(tmp_path.glob("*.tmp*"))
        left[0] = 1  # the next save is tried twice
        failing.save(3, example(), {})
        failing.close()
        assert len(failing.messages()) == 1
        (done,) = checkpoint.checkpoints(tmp_path)
        assert done.name == "step_00000003" and checkpoint.verify(done) == []


def test_a_vanished_folder_comes_back_and_a_file_in_its_place_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "RETRY_AFTER_S", ())
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    shutil.rmtree(folder)
    save(folder, 2)
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step_00000002"]
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(OSError, match="step_00000003 not written"):
        save(folder, 3)


def test_what_is_saved_is_the_state_of_the_call(tmp_path, monkeypatch):
    """The training changes its tensors while the thread writes; and a second save waits for the first."""
    original, order = saver.write, []

    def slowly(folder, step, *args, **kwargs):
        time.sleep(0.3)
        order.append(step)
        return original(folder, step, *args, **kwargs)

    monkeypatch.setattr(saver, "write", slowly)
    writing, state = checkpoint.Saver(tmp_path, keep=checkpoint.Retention(), asynchronous=True), example()
    generators = torch.get_rng_state()
    writing.save(1, state, {})
    assert writing.pause_s < 0.2 and not order
    torch.rand(5)
    for tensor in state.values():
        tensor.fill_(7.0)
    writing.save(2, state, {})
    assert writing.pause_s > 0.2 and order == [1]
    writing.close()
    for step, expected in ((1, example()), (2, state)):
        found = blank()
        checkpoint.load_state(tmp_path / f"step_{step:08d}", found)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert checkpoint.restore_rng(tmp_path / "step_00000001", 0) and torch.equal(torch.get_rng_state(), generators)


def test_what_json_changes_is_no_damage(tmp_path):
    done = save(tmp_path, 1, info={"config": {2: "a", 10: ("b", None)}})
    assert checkpoint.verify(done) == [] and checkpoint.read_info(done)["config"] == {"2": "a", "10": ["b", None]}


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    before, _ = save(tmp_path, 1), save(tmp_path, 2)
    original = store.fingerprint

    def broken_disk(path):
        if "step_00000002" in str(path) and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(store, "fingerprint", broken_disk)
    said = []
    assert checkpoint.resolve(tmp_path, said.append) == before and "Input/output error" in said[0]


def test_an_old_one_that_cannot_be_deleted_is_no_failure(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def busy(*_, ignore_errors=False, **__):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (2, 3):
        assert checkpoint.verify(save(tmp_path, step, newest=1)) == []
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000003"]


@pytest.mark.parametrize("allowed", [0, 1])
def test_who_has_lost_the_folder_touches_nothing_in_it(tmp_path, monkeypatch, allowed):
    """Lost before the save, or while it was written: the next owner's unfinished checkpoint stays as it is."""
    monkeypatch.setattr("gptoss_dist.checkpoint.saver.RETRY_AFTER_S", (0.0, 0.0))
    other, calls = tmp_path / "step_00000009.tmp" / "rank_00000.safetensors", []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) > allowed:
            other.parent.mkdir(exist_ok=True)
            other.write_text("being written")
            raise OSError("taken over by process 7")

    saver = checkpoint.Saver(tmp_path, keep=checkpoint.Retention(), asynchronous=False, check=check)
    saver.save(9, example(), {})
    with pytest.raises(OSError, match="taken over by process 7"):
        saver.close()
    assert other.read_text() == "being written" and not checkpoint.checkpoints(tmp_path)


def test_which_checkpoints_stay(tmp_path):
    losses = {1: math.nan, 2: 2.0, 3: None, 4: 2.5, 5: None, 6: 2.6, 7: 2.7}
    keep = checkpoint.Retention(newest=2, every=3, best=True)
    writing = checkpoint.Saver(tmp_path, keep=keep, asynchronous=False)
    for step, loss in losses.items():
        writing.save(step, example(), {"validation_loss": loss})
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path)] == [2, 3, 6, 7]


@pytest.mark.parametrize("seed", range(10))
def test_every_damage_is_found_and_the_one_before_is_taken(tmp_path, seed):
    """Four each: a flipped bit, a truncation, a deleted file, two files swapped; in any file."""
    draw = random.Random(seed)
    before = save(tmp_path, 1)
    extra = lambda folder: (folder / "tokenizer.json").write_text("{}")  # noqa: E731
    writing = checkpoint.Saver(tmp_path, keep=checkpoint.Retention(), asynchronous=False)
    writing.save(2, example(), {}, extra_files=extra)
    whole = tmp_path / "step_00000002"
    copy = tmp_path.with_name(tmp_path.name + "-copy")
    shutil.copytree(whole, copy)
    assert checkpoint.resolve(tmp_path) == whole
    for kind in ("bit", "truncated", "deleted", "swapped"):
        path = draw.choice(sorted(whole.iterdir()))
        if kind == "bit":
            data = bytearray(path.read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
        elif kind == "truncated":
            os.truncate(path, draw.randrange(path.stat().st_size))
        elif kind == "deleted":
            path.unlink()
        else:
            other = draw.choice([p for p in sorted(whole.iterdir()) if p != path])
            data = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        said = []
        assert checkpoint.resolve(tmp_path, said.append) == before, kind
        named = (path.name, "checkpoint.json") if kind == "swapped" else (path.name,)
        assert len(said) == 1 and any(name in said[0] for name in named), (kind, path, said)
        shutil.rmtree(whole)
        shutil.copytree(copy, whole)
    shutil.copy(before / "rank_00000.safetensors", whole / "rank_00001.safetensors")
    assert checkpoint.verify(whole) == ["rank_00001.safetensors does not belong to it"]
    (whole / "rank_00001.safetensors").unlink()
    whole.rename(tmp_path / "step_00000003")
    assert checkpoint.verify(tmp_path / "step_00000003") == ["checkpoint.json is of step 2"]


def test_misfits_are_listed(tmp_path):
    done = save(tmp_path, 1)
    state = blank()
    state["model.a"] = torch.zeros(4, 3)
    state["model.new"] = state.pop("model.b")
    with pytest.raises(ValueError) as error:
        checkpoint.load_state(done, state)
    for part in ("model.new is missing", "model.b is not expected", "model.a has shape (5, 3), expected (4, 3)"):
        assert part in str(error.value)


def test_another_branch_does_not_take_old_checkpoints_for_its_own(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, info={"branch": "old"})
    assert [p.name for p in checkpoint.set_aside(tmp_path, after=1)] == [
        "step_00000002.superseded",
        "step_00000003.superseded",
    ]
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_00000001"]
    # and a save at a step that exists replaces it
    done = save(tmp_path, 1, info={"branch": "new"})
    assert checkpoint.read_info(done)["branch"] == "new"
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_death_of_a_peer_is_no_damage(tmp_path, monkeypatch):
    done = save(tmp_path, 1)

    def lost(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")

    monkeypatch.setattr(store.dcp, "load", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoint.load_state(done, blank())


def test_what_is_not_finite_is_named():
    state = example() | {
        "model.c": torch.tensor([[1.0, torch.nan], [0.0, 3.0]], dtype=torch.bfloat16),
        "optim.d": torch.tensor([3e38, -torch.inf]),
        "count": torch.tensor([2]),
        "empty": torch.empty(0),
    }
    assert checkpoint.not_finite(state) == ["model.c", "optim.d"]
    assert checkpoint.not_finite(example()) == checkpoint.not_finite({}) == []


def test_only_own_leftovers_are_deleted(tmp_path):
    for name in ("step_00000007.tmp", "step_00000003.tmp.old", "step_mine.tmp", "step_1.tmp.notes"):
        (tmp_path / name).mkdir()
    save(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "step_mine.tmp", "step_1.tmp.notes"}


def test_damage_is_one_clear_error(tmp_path):
    done = save(tmp_path, 1)
    (shard,) = done.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot be read|is damaged"):
        checkpoint.load_state(done, blank())
    (done / "checkpoint.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.read_info(done)
    (done / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint\.json: is not readable JSON"):
        checkpoint.read_info(done)
