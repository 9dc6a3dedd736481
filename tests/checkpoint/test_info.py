"""`checkpoint.json`, typed; and a checkpoint that an earlier version wrote, which must be read to the last bit."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gptoss_dist
from gptoss_dist import checkpoint
from gptoss_dist.checkpoint.formats.tensor_files import stored_tensors
from gptoss_dist.checkpoint.info import FORMAT, INFO, CheckpointInfo, read_info, sealed

FIXTURES = Path(__file__).parent / "fixtures"
EARLIER = FIXTURES / "step_00000003"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fingerprint(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def rewritten(folder: Path, values: dict) -> Path:
    (folder / INFO).write_text(sealed(values))
    return folder


def test_an_earlier_checkpoint_is_intact_and_its_model_the_same():
    assert checkpoint.verify(EARLIER) == [] and checkpoint.resolve(EARLIER) == EARLIER
    model = gptoss_dist.load_pretrained(EARLIER)
    for name, parameter in model.named_parameters():
        assert fingerprint(parameter) == EXPECTED["sha256"][f"model.{name}"], name
    with torch.no_grad():
        total = model(torch.arange(8)[None]).double().sum().item()
    assert total == pytest.approx(EXPECTED["logits_sum"], abs=1e-4)


def test_an_earlier_checkpoint_gives_the_whole_state(process_group):
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in stored_tensors(EARLIER).items()}
    assert any(name.startswith("optim.exp_avg_sq.") for name in state)
    checkpoint.load_state(EARLIER, state)
    assert {name: fingerprint(tensor) for name, tensor in state.items()} == EXPECTED["sha256"]
    assert checkpoint.restore_rng(EARLIER, 0)


def test_an_earlier_checkpoint_says_where_its_run_was():
    info = CheckpointInfo.read(EARLIER)
    assert (info.step, info.samples_consumed, info.tokens, info.skipped_steps) == (3, 6, 192, 0)
    assert info.validation_loss == 5.537593841552734 and info.mlflow_run_id is None
    assert info.config["model"]["hidden_size"] == 16 and info.code == "2bf0cb27df16" and info.world_size == 1
    assert info.data.path == "data" and info.data.mixture["read"] == {info.data.content_sha256: 6}
    assert info.layout == "fsdp, replicate 1 x shard 1 (experts 1 x 1)" and "rng_00000.json" in info.files


def test_what_is_written_is_read(tmp_path, process_group):
    before = CheckpointInfo.read(EARLIER)
    done = checkpoint.save(tmp_path, 3, {"model.a": torch.ones(2)}, before.to_json())
    assert read_info(done).keys() == read_info(EARLIER).keys() | {"recent_losses"}
    after = CheckpointInfo.read(done)
    assert dataclasses.replace(after, torch=before.torch, files=before.files) == before


def test_keys_that_were_not_always_written_have_defaults(tmp_path):
    """As before there were mixtures, versions of the order of samples, and a count of tokens."""
    values = read_info(EARLIER)
    recent = ("tokens", "skipped_steps", "validation_loss", "mlflow_run_id", "code", "layout", "world_size", "torch")
    values = {key: value for key, value in values.items() if key not in recent}
    values["data"] = {"path": "folder/stories", "content_sha256": "ab"}
    info = CheckpointInfo.read(rewritten(tmp_path, values))
    assert (info.tokens, info.skipped_steps, info.validation_loss, info.code) == (6 * 32, 0, None, None)
    assert info.data.versions == {} and info.data.skipped == [] and info.recent_losses == []
    assert info.data.mixture == {
        "start": 0,
        "start_step": 0,
        "consumed": {},
        "sources": [{"name": "stories", "content_sha256": "ab", "weight": 1.0, "max_epochs": None}],
        "stages": [],
        "read": {"ab": 6},
        "history": [],
    }


def test_a_key_that_is_unknown_is_ignored_and_one_that_is_needed_is_named(tmp_path):
    values = read_info(EARLIER)
    assert CheckpointInfo.read(rewritten(tmp_path, values | {"later": 1})) == CheckpointInfo.read(EARLIER)
    del values["samples_consumed"]
    with pytest.raises(ValueError, match=r"checkpoint\.json: samples_consumed is missing"):
        CheckpointInfo.read(rewritten(tmp_path, values))


def test_another_format_is_refused_with_the_remedy(tmp_path):
    for number, remedy in ((FORMAT + 1, "update gptoss_dist"), (1, "the version of gptoss_dist that wrote it")):
        with pytest.raises(ValueError, match=f"checkpoint.json has format {number}, .*{remedy}") as error:
            CheckpointInfo.read(rewritten(tmp_path, read_info(EARLIER) | {"format": number}))
        assert "\n" not in str(error.value)


SKIPPED = {"first": 6, "end": 9, "order": "ab", "step": 4, "rewound_to": 3, "reason": "the loss rose"}


def test_what_is_skipped_and_what_a_spike_is_told_by_is_kept(tmp_path):
    before = CheckpointInfo.read(EARLIER)
    data = dataclasses.replace(before.data, skipped=[SKIPPED])
    recent = [(2, 5.25, 4), (3, None, 6)]
    values = read_info(EARLIER) | dataclasses.replace(before, data=data, recent_losses=recent).to_json()
    after = CheckpointInfo.read(rewritten(tmp_path, values))
    assert (after.data.skipped, after.recent_losses) == ([SKIPPED], recent)
    for wrong, message in (({"end": 6}, "skipped: 6 to 6 is no range"), ({"first": -1}, r"skipped\[0\]\.first=-1")):
        values["data"]["skipped"] = [SKIPPED | wrong]
        with pytest.raises(ValueError, match=rf"checkpoint\.json: .*{message}") as error:
            CheckpointInfo.read(rewritten(tmp_path, values))
        assert "\n" not in str(error.value)
