"""What the launchers say about the processes of a run, put into torchrun's words.

torchrun, deepspeed, srun and mpirun each name rank, number of processes and meeting point differently. `complete` fills
in what is missing of torchrun's variables, once and before anything reads them; only `hosts.py` looks at variables of
Slurm as well, for the names of machines.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import MutableMapping

from gptoss_dist.distributed import hosts
from gptoss_dist.distributed.hosts import expand

# Rank, processes in all, rank on this machine, processes on this machine, as MPI's launchers and srun name them; srun
# has no variable for the last.
_FOREIGN = {
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
}


_program = "gptoss_dist"


def set_program(name: str) -> None:
    """Set the name that messages to the user begin with; the launch script calls this once."""
    global _program
    _program = name


def program() -> str:
    """Return the name of the program, for messages to the user."""
    return _program


def complete(environment: MutableMapping[str, str] | None = None) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where a launcher gave others.

    Variables that are there already are kept. Without any launcher nothing is set: the run is one process. A shell
    inside of a Slurm allocation, a batch script for example, is no launcher; only what `srun` started counts.

    Args:
        environment: The variables to complete, which are the process's own by default.

    Raises:
        ValueError: The launcher does not say where the processes meet.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env:
        launcher = next((name for name, variables in _FOREIGN.items() if _is_started_by(env, variables)), None)
        if launcher is None:
            return
        rank, world_size, local_rank, local_size = _FOREIGN[launcher]
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env[rank], env[world_size], env[local_rank]
        if local_size is None:
            env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_on_this_node(env)))
        elif local_size in env:
            env.setdefault("LOCAL_WORLD_SIZE", env[local_size])
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _meeting_host(env, launcher)
        # The same on every machine, and another for every job and step, so that two of one machine do not meet. A step
        # that mpirun's own srun made is not the same everywhere.
        step = int(env.get("SLURM_STEP_ID", 0)) if launcher == "srun" else 0
        job = int(env.get("SLURM_JOB_ID", 0)) * 100 + step
        env.setdefault("MASTER_PORT", str(20000 + job % 20000))
    if "LOCAL_SIZE" in env:  # deepspeed
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])


def is_deepspeed(environment: MutableMapping[str, str] | None = None) -> bool:
    """Return whether the `deepspeed` launcher started this process."""
    env = os.environ if environment is None else environment
    return "CROSS_RANK" in env and "LOCAL_SIZE" in env and "TORCHELASTIC_RUN_ID" not in env


def restart_advice(environment: MutableMapping[str, str] | None = None) -> str:
    """Return what to change if processes that torchrun has restarted on several machines do not meet again.

    torchrun's agents lend the processes their own store, under keys with a count of restarts that each agent keeps for
    itself: after a lost machine they differ (https://github.com/pytorch/pytorch/issues/135712).

    Returns:
        The end of a sentence; empty where that cannot be the reason.
    """
    env = os.environ if environment is None else environment
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and env.get("GROUP_WORLD_SIZE", "1") != "1" and env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return "; for restarts on several machines, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    return ""


def report_error_once(mistake: str, *, alone: bool = False, patience_s: float = 30.0) -> None:
    """Write a user's mistake to stderr: once on each machine, though all its processes meet it.

    The first process of a machine writes it and exits, whereupon its launcher ends the others. They wait for that: if
    one of them exited earlier, the launcher might end the first before it has written. One that still lives after
    `patience_s` seconds has met what the first did not, and writes it itself.

    Args:
        mistake: What is wrong, in one line.
        alone: Whether this process knows that no other says it.
        patience_s: How long the other processes wait.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not alone:
        print(f"{_program}: {mistake}", file=sys.stderr)
        return
    if not alone:
        time.sleep(patience_s)
    print(f"{_program}: rank {os.environ.get('RANK', 0)}: {mistake}", file=sys.stderr)


def without_local_rank(argv: list[str]) -> list[str]:
    """Return `argv` without the `--local_rank=N` that `deepspeed` (and an old `torch.distributed.launch`) puts first.

    The environment says the same.
    """
    if argv and re.fullmatch(r"--local[_-]rank=\d+", argv[0]):
        return argv[1:]
    if len(argv) > 1 and re.fullmatch(r"--local[_-]rank", argv[0]) and argv[1].isdecimal():
        return argv[2:]
    return argv


def _is_started_by(env: MutableMapping[str, str], variables: tuple[str | None, ...]) -> bool:
    return all(name in env for name in variables[:3])


def _tasks_on_this_node(env: MutableMapping[str, str]) -> int:
    counts = hosts.tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    return counts[int(env.get("SLURM_NODEID", 0))]


def _meeting_host(env: MutableMapping[str, str], launcher: str) -> str:
    if nodes := (launcher == "srun" and env.get("SLURM_STEP_NODELIST")) or env.get("SLURM_JOB_NODELIST"):
        return expand(nodes)[0]
    if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        return "127.0.0.1"
    raise ValueError(
        f"MASTER_ADDR is not set and {launcher} does not say on which machine rank 0 runs; "
        "set it to that machine's name, for example mpirun -x MASTER_ADDR=node1"
    )
