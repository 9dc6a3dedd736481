"""What holds for the whole suite: no network, three groups of tests, and a process that each test leaves as it was."""

import os
import random
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import torch
import yaml

from tests.support.ranks import MODEL


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--random-order", type=int, metavar="SEED", help="run the files, and the tests of each file, in a random order"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let SIGTERM and Ctrl-C end the tests with their fixtures, which stop what they have started.

    A shell starts what runs in the background with SIGINT ignored, and the processes of the tests would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    own = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a fork that is to end
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a C++ compiler where there is none, and shuffle if asked to."""
    if shutil.which("g++") is None:
        for item in items:
            if item.get_closest_marker("compiled"):
                item.add_marker(pytest.mark.skip(reason="torch.compile needs a C++ compiler on CPU"))
    seed = config.getoption("--random-order")
    if seed is not None:
        # A file's tests stay together: what its fixtures make for all of them is made once.
        files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
        generator = random.Random(seed)
        generator.shuffle(files)
        for tests in files:
            generator.shuffle(tests)
        items[:] = [item for tests in files for item in tests]


def process_state() -> dict[str, object]:
    """Return what belongs to the whole process and what a test might leave changed."""
    return {
        "working directory": os.getcwd(),
        "default dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "process group": torch.distributed.is_initialized(),
    }


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Restore the environment after each test, and fail a test that leaves the process in another state.

    The environment is restored in silence, because the code under test rightly sets variables for the rest of its
    process: those of a launcher, DeepSpeed's accelerator, cuBLAS's workspace. A process that a later test starts would
    inherit them, and a LOCAL_RANK, for example, makes other tools believe that a launcher started them.
    """
    variables, before = dict(os.environ), process_state()
    yield
    os.environ.clear()
    os.environ.update(variables)
    assert process_state() == before, "the test changed the process it runs in"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small synthetic dataset with the `bytes` tokenizer, for training tests."""
    from data_pipeline.prepare.__main__ import main

    path = tmp_path_factory.mktemp("corpus") / "synthetic"
    code = main(
        shlex.split(f"synthetic --output {path} --tokenizer bytes --validation-fraction 0.2 --max-documents 200")
    )
    assert code == 0
    return path


@pytest.fixture
def settings(tmp_path, corpus):
    """A tiny run's YAML."""
    values = {
        "run": {"name": "tiny", "dir": str(tmp_path / "tiny")},
        "model": MODEL,
        "data": {"path": str(corpus), "seq_len": 48},
        "train": {"steps": 12, "micro_batch_size": 2, "gradient_accumulation": 2, "precision": "fp32"},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "loss": {"aux_coef": 0.01, "z_coef": 0.001},
        "checkpoint": {"every": 4, "keep": 2},
        "validation": {"every": 6, "samples": 6},
        "tracking": {"mlflow": False, "plots": False, "report": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(params=["multiplied in float32", "multiplied in bf16"])
def bf16_products(request, monkeypatch) -> str:
    """Runs a test as on a CPU without instructions for bf16, casting however few rows there are, and as on one with."""
    from gptoss_dist.ops import gemm

    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", request.param == "multiplied in bf16")
    monkeypatch.setattr(gemm, "MIN_ROWS", 1)
    return request.param
