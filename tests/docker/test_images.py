"""Both Dockerfiles are really built, and what they make runs where images have to run.

That takes half an hour and 20 GB of disk while it lasts; with IMAGE_LAB=FOLDER a second time takes one or two.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker import compose, images

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(images.why_not() is not None, reason=str(images.why_not())),
]

UNKNOWN = 12345
"""An id that no list of users has."""
REVISION = "0123456789ab"
CODE = "/opt/gptoss_dist"


@pytest.fixture(scope="module", autouse=True)
def lab() -> Iterator[None]:
    try:
        images.make_base()
    except images.NoBase as error:
        pytest.skip(str(error))
    yield
    images.clean()


@pytest.fixture(scope="module")
def cpu(lab) -> str:
    tag = "localhost/gptoss_dist:cpu"
    images.build("cpu.Dockerfile", tag, BASE_IMAGE=images.BASE, REVISION=REVISION)
    return tag


@pytest.fixture
def volume(tmp_path) -> Path:
    """The one folder that a container may write to, which belongs to the unknown id."""
    folder = tmp_path / "volume"
    folder.mkdir()
    os.chown(folder, UNKNOWN, UNKNOWN)
    return folder


def run(tag: str, *arguments: str, volume: Path, **options) -> str:
    """Run a command in a container as the unknown id; return what it printed, or fail."""
    done = images.run(tag, *arguments, volume=volume, user=UNKNOWN, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


PREPARE = ("python", "-m", "data_pipeline.prepare", "pystdlib", "--output", "data/pystdlib", "--tokenizer", "builtin")
QUICKSTART = ("--config", f"{CODE}/configs/quickstart.yaml", "--optim.warmup_steps", "2")


def test_an_unknown_user_without_a_home_trains_on_a_read_only_root(cpu, volume):
    refused = images.run(cpu, "touch", f"{CODE}/x", volume=volume, user=UNKNOWN)
    assert "Read-only file system" in refused.stderr
    run(cpu, *PREPARE, volume=volume)
    said = run(cpu, *QUICKSTART, "--train.steps", "20", volume=volume)
    assert "finished at step 20" in said and "cannot" not in said and "not in MLflow" not in said, said
    folder = volume / "runs/quickstart"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["metrics"]["loss/train"] for row in rows if "loss/train" in row.get("metrics", {})]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert (folder / "DONE").exists() and (folder / "plots/loss.png").exists()
    assert f'"git.sha": "{REVISION}"' in (folder / "tracking/journal.jsonl").read_text()
    # Nothing that a library put where it believed the home to be.
    assert {path.name for path in volume.iterdir()} <= {"data", "runs", "mlflow.db", "mlflow.db.lock", "mlartifacts"}


def test_without_the_entry_point_it_trains_and_tracks_too(cpu, volume):
    """As in a pod whose `command` replaces the entry point; two processes, under torchrun."""
    run(cpu, *PREPARE, volume=volume)
    quick = ("--train.steps", "3", "--sampling.every", "0", "--validation.samples", "8")
    train = ("torchrun", "--standalone", "--nproc_per_node", "2", f"{CODE}/launch/train.py", *QUICKSTART)
    said = run(cpu, *train, *quick, volume=volume, entrypoint=False)
    assert "finished at step 3" in said and "cannot be imported" not in said, said
    assert (volume / "mlflow.db").exists()
    assert {path.name for path in volume.iterdir()} <= {"data", "runs", "mlflow.db", "mlflow.db.lock", "mlartifacts"}


def test_an_image_holds_no_caches_and_no_tests(cpu, volume):
    listed = run(cpu, "find", CODE, "/var/lib/apt/lists", "/workspace", volume=volume)
    assert f"{CODE}/gptoss_dist/train/loop.py\n" in listed and f"{CODE}/tests" not in listed
    assert ".cache" not in listed and "/var/lib/apt/lists/" not in listed


def test_the_dockerfile_for_gpus_builds_without_its_steps_for_cuda(volume):
    tag = "localhost/gptoss_dist:cuda"
    images.build("cuda.Dockerfile", tag, BUILD_IMAGE=images.BASE, BASE_IMAGE=images.BASE, CUDA="0", REVISION=REVISION)
    said = run(tag, "--config", f"{CODE}/configs/quickstart.yaml", "--dry-run", volume=volume)
    assert "parameters" in said
    # Triton compiles against Python's headers when a kernel first runs.
    compiled = 'echo "#include <Python.h>" | g++ $(python3-config --includes) -xc++ -c - -o /tmp/x'
    run(tag, "sh", "-c", compiled, volume=volume)


def test_the_server_of_compose_is_built_with_its_driver(volume):
    tag = "localhost/gptoss_dist:mlflow"
    images.build("mlflow.Dockerfile", tag, BASE_IMAGE=images.BASE)
    said = run(tag, "python", "-c", "import mlflow, psycopg2; print(mlflow.__version__)", volume=volume)
    pinned = next(line for line in (images.ROOT / "launch/constraints.txt").read_text().split() if "mlflow==" in line)
    assert said.strip() == pinned.removeprefix("mlflow==")
    # Its command and its health check, with a database of its own: nothing but /tmp is written to, as Compose has it.
    service = compose.services(POSTGRES_PASSWORD="x")["mlflow"]
    line = [re.sub(r"=postgresql.*", "=sqlite:////tmp/mlflow.db", word) for word in service["command"]]
    check = shlex.join(service["healthcheck"]["test"][1:])
    wait = f'"$@" >/tmp/log 2>&1 & for _ in $(seq 90); do sleep 2; {check} && exit; done; cat /tmp/log; exit 1'
    run(tag, "sh", "-c", wait, "sh", *line, volume=volume)
