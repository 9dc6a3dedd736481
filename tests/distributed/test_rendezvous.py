"""Processes that find each other, or are told why not; real launches are in tests/launch."""

import platform
import socket
import threading
import time

import pytest

from gptoss_dist.distributed import launchers, rendezvous
from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.distributed.rendezvous import check_variables, open_store
from tests.support.fork_server import free_port

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_variables():
    assert check_variables({}) == (0, 1, 0)
    assert check_variables({"WORLD_SIZE": "1"}) == (0, 1, 0)
    assert check_variables({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0)
    assert check_variables(TWO) == (1, 2, 1)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        (TWO | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (TWO | {"RANK": "-1"}, "RANK=-1 is not a number from 0 on"),
        (TWO | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number from 0 on"),
        (TWO | {"WORLD_SIZE": "0"}, "RANK=1 is not below WORLD_SIZE=0"),
        (TWO | {"LOCAL_RANK": ""}, "LOCAL_RANK= is not a number"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR is not; set it to where rank 0 can be reached"),
        ({k: v for k, v in TWO.items() if k != "MASTER_PORT"}, "MASTER_PORT is not"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_variables_that_contradict_each_other(env, message):
    with pytest.raises(LocalError, match=message):
        check_variables(env)


@pytest.fixture
def meet(monkeypatch):
    """Have ranks open their store, each in a thread; return an error or None of each."""
    for name, value in {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "RENDEZVOUS_TIMEOUT": "1.5",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_MESSAGE_AFTER_S", 0.3)

    def run(ranks: list[int], world_size: int) -> list[str | None]:
        stores, results = {}, {}

        def work(index: int) -> None:
            try:
                stores[index] = open_store(ranks[index], world_size, 60.0)  # kept: rank 0's serves the others
                results[index] = None
            except LocalError as error:
                results[index] = str(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return [results[index] for index in range(len(ranks))]

    return run


def test_all_meet(meet):
    assert meet([2, 0, 1], 3) == [None, None, None]


def test_rank_0_says_who_is_missing_and_gives_up(meet, capfd):
    (error,) = meet([0], 3)
    assert "2 of 3 ranks, ranks 1-2, did not come to localhost:" in error and "WORLD_SIZE" in error
    assert f"rank 0 on {platform.node()} waits at localhost:" in capfd.readouterr().err


@pytest.mark.heavy
def test_who_is_missing_is_named_by_host(meet, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[08-10]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x3)")
    errors = meet([0, 2], 3)
    assert "1 of 3 ranks, gpu09 (rank 1), did not come to localhost:" in errors[0]
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    errors = meet([0, 2], 4)
    assert f"2 of 4 ranks, {platform.node()} (ranks 1, 3), did not come" in errors[0]


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a" * 70 + ".invalid"])
def test_an_address_that_does_not_resolve(meet, monkeypatch, address):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("RENDEZVOUS_TIMEOUT", "600")
    monkeypatch.setattr(rendezvous, "_RESOLVE_S", 0.2)
    began = time.monotonic()
    errors = meet([0, 1], 2)
    assert time.monotonic() - began < 10
    for rank, error in enumerate(errors):
        assert f"MASTER_ADDR={address} cannot be resolved by rank {rank} on {platform.node()} (" in error


@pytest.fixture(autouse=True)
def _program(monkeypatch):
    """Messages begin with the library's name, whichever command an earlier test of this process has run."""
    monkeypatch.setattr(launchers, "_program", "gptoss_dist")


@pytest.mark.heavy
def test_another_rank_says_that_it_waits_for_rank_0(meet, capfd):
    (error,) = meet([1], 2)
    assert f"rank 1 on {platform.node()} did not reach rank 0 at localhost:" in error and "MASTER_PORT" in error
    assert f"gptoss_dist: rank 1 on {platform.node()} waits for rank 0 at localhost:" in capfd.readouterr().err


def test_a_rank_that_is_there_twice(meet):
    errors = meet([0, 1, 1], 3)
    assert any(error and "two processes have RANK=1" in error for error in errors)


def test_a_port_that_is_taken(meet, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        (error,) = meet([0], 2)
    assert "the port is in use" in error and "set MASTER_PORT to a free one" in error


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf"])
def test_a_patience_that_is_none(meet, monkeypatch, text):
    monkeypatch.setenv("RENDEZVOUS_TIMEOUT", text)
    (error,) = meet([0], 2)
    assert f"RENDEZVOUS_TIMEOUT={text} is not a number of seconds" in error
