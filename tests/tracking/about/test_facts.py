"""What is known of a run before its first step, as tags."""

import platform
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptoss_dist.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    parse_arguments,
)
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.planner.parameters import count_parameters
from gptoss_dist.tracking.about.facts import facts_of
from gptoss_dist.tracking.about.settings import UNKNOWN, changed_settings, launch_command
from gptoss_dist.tracking.recorded.run import flat

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, head_dim=8
)


def config_of(folder, **sections):
    return Config(model=MODEL, run=RunConfig(name="run-3", dir=str(folder)), **sections)


def facts_on(config, hosts=("a", "a", "b", "b"), shares=None):
    ranks = SimpleNamespace(world_size=len(hosts), device=torch.device("cpu"), hosts=hosts)
    engine = SimpleNamespace(name="fsdp", layout=DeviceLayout(1, len(hosts), 1, context_parallel=2))
    return facts_of(config, ranks, engine, None, shares)


def test_tags_group_and_filter(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    config = config_of(
        tmp_path,
        data=DataConfig(path="data/x", seq_len=128),
        train=TrainConfig(micro_batch_size=2, gradient_accumulation=3),
    )
    tags = facts_on(config, shares={"web": 3.0, "code": 1.0}).tags()
    counts = count_parameters(MODEL)
    assert tags["model.params"] == str(counts.total) and tags["model.active_params"] == str(counts.active)
    assert tags["tokens_per_step"] == str(2 * 3 * 2 * 128), "four processes, two of which share each sequence"
    assert float(tags["flops_per_token"]) == flops_per_token(MODEL, 128).training
    assert tags["data"] == "web 75 %, code 25 %"
    assert tags["sweep"] == "run" and tags["slurm.job_id"] == "77_3"
    assert tags["run.folder"] == str(tmp_path) and tags["mfu.peak"] == "unknown"
    assert {"git.sha", "host", "hardware", "torch", "world_size", "layout", "engine", "precision"} <= tags.keys()
    assert all(isinstance(value, str) for value in tags.values())


def test_nodes_are_named_only_where_there_are_several(tmp_path, monkeypatch):
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    facts = facts_on(config_of(tmp_path), hosts=("a", "a"), shares={"web": 1.0})
    assert facts.node is None and facts_on(config_of(tmp_path)).node == platform.node()
    assert facts.data == (("web", None),)
    assert facts.devices.startswith("2 processes on 1 machine, ")
    assert not {"sweep", "slurm.job_id"} & facts.tags().keys()


def test_only_what_differs_from_the_defaults_is_listed(tmp_path):
    config = config_of(tmp_path, data=DataConfig(path="data/x"), optim=OptimConfig(lr=1e-3, betas=[0.9, 0.95]))
    changed = {"data.path": ("data/x", "data/pystdlib"), "optim.lr": (1e-3, 4e-4)}
    settings = flat(config.to_dict())
    assert changed_settings(settings, with_model=False) == changed
    assert facts_on(config).changed == {"data.path": "data/x", "optim.lr": "0.001"}
    with_model = changed_settings(settings, with_model=True)
    assert with_model["model.num_hidden_layers"][0] == 2 and changed.items() <= with_model.items()
    odd = changed_settings({"optim.new": 1, "optim.gone": None, "optim.betas": (0.9, 0.95)}, with_model=False)
    assert odd == {"optim.new": (1, UNKNOWN)}


@pytest.mark.parametrize(
    "processes, machines, expected",
    [
        (1, 1, "python launch/train.py"),
        (4, 1, "torchrun --standalone --nproc_per_node 4 launch/train.py"),
        (16, 2, "torchrun --nnodes 2 ... --nproc_per_node 8 launch/train.py"),
        (16, None, "torchrun --standalone --nproc_per_node 16 launch/train.py"),
    ],
)
def test_the_command_starts_the_processes_of_one_machine(tmp_path, processes, machines, expected):
    assert launch_command(tmp_path / "a b", processes, machines) == f"{expected} --config '{tmp_path / 'a b'}'"
    if machines and processes > 1:
        hosts = [f"n{rank * machines // processes}" for rank in range(processes)]
        facts = facts_on(config_of(tmp_path), hosts=hosts)
        assert facts.resume_command.startswith(expected) and facts.tags()["machines"] == str(machines)


def test_a_run_is_repeated_in_folders_of_its_own(tmp_path):
    config = config_of(tmp_path / "run", checkpoint=CheckpointConfig(dir=str(tmp_path / "elsewhere")))
    config.save(tmp_path / "run" / "config.yaml")
    facts = facts_on(config, hosts=("a",))
    again, _ = parse_arguments(shlex.split(facts.repeat_command)[2:])
    assert (again.run.name, again.folder) == ("run-3-again", Path("runs/run-3-again"))
    assert again.checkpoint_folder == again.folder / "checkpoints"
    resumed, _ = parse_arguments(shlex.split(facts.resume_command)[2:])
    assert resumed.checkpoint_folder == tmp_path / "elsewhere"
