"""Every launcher's variables become torchrun's; real launches are in tests/launch."""

import pytest

from gptoss_dist.distributed.hosts import expand
from gptoss_dist.distributed.launcher_watch import program_of
from gptoss_dist.distributed.launchers import complete, is_deepspeed, restart_advice, without_local_rank

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007,011]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


class Environment(dict):
    """As picky as `os.environ`."""

    def __contains__(self, name):
        assert isinstance(name, str)
        return super().__contains__(name)


def completed(env: dict) -> dict:
    env = Environment(env)
    complete(env)
    return env


def test_srun():
    added = {key: value for key, value in completed(SRUN).items() if key not in SRUN}
    assert added == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(20000 + 123407 % 20000),
    }
    assert completed(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})["MASTER_ADDR"] == "a"


def test_a_batch_script_is_one_process():
    """It sees the variables of the job and of its own step, which srun did not make."""
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert completed(batch) == batch


def test_mpirun():
    assert completed(OPENMPI)["MASTER_ADDR"] == "127.0.0.1"
    assert completed(OPENMPI)["LOCAL_WORLD_SIZE"] == "2"
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        completed(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    mpich = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n1"}
    assert completed(mpich)["RANK"] == "3" and completed(mpich)["MASTER_ADDR"] == "n1"


def test_deepspeed_and_torchrun():
    deepspeed = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
    assert completed(deepspeed) == deepspeed | {"LOCAL_WORLD_SIZE": "2"}
    assert is_deepspeed(deepspeed)
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    assert completed(torchrun) == torchrun and not is_deepspeed(torchrun)
    assert not is_deepspeed(torchrun | deepspeed)  # torchrun inside of a shell that deepspeed started
    assert completed({}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-09,12],login", "gpu07"), ("r[1-2]n[04-05]", "r1n04")],
)
def test_first_host(nodes, first):
    assert expand(nodes)[0] == first


def test_local_rank_is_dropped_only_in_front():
    rest = ["--config", "a.yaml"]
    for front in (["--local_rank=1"], ["--local-rank", "1"], []):
        assert without_local_rank(front + rest) == rest
    assert without_local_rank([*rest, "--local_rank=1"]) == [*rest, "--local_rank=1"]


def test_advice_for_restarts_on_several_machines():
    lent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in restart_advice(lent)
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("GROUP_WORLD_SIZE", "1"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
    ):
        assert restart_advice(lent | {name: value}) == ""
    assert restart_advice({}) == ""


@pytest.mark.parametrize(
    "line, program",
    [
        ("/x/bin/python3.11 -u /x/bin/torchrun --standalone train.py", "torchrun"),
        ("python -u -X dev -m torch.distributed.run --nnodes 2 train.py", "torch.distributed.run"),
        ("/usr/bin/python /x/bin/deepspeed --num_gpus 2 train.py", "deepspeed"),
        ("torchrun train.py", "torchrun"),
        ("bash run.sh deepspeed", "bash"),
        ("timeout 3600 python launch/train.py --engine.kind deepspeed", "timeout"),
        ("python sweep.py deepspeed", "sweep.py"),
        ("python -c import_deepspeed deepspeed", "import_deepspeed"),
        ("python", ""),
    ],
)
def test_a_launcher_is_what_a_process_runs_and_not_a_word_that_it_is_given(line, program):
    assert program_of(line.split()) == program
