"""The files of docker/ by themselves: linted, parsed by Compose, and consistent with the commands that they name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gptoss_dist.config import parse_arguments
from tests.docker import compose, images
from tests.support.ranks import ROOT

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


def compose_program() -> list[str] | None:
    """The real Compose: Docker's plugin, or the program by itself."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = ["docker", "compose"]
    known = shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0
    return plugin if known else None


@pytest.mark.skipif(hadolint() is None, reason="no hadolint here: sh launch/install.sh --extras dev")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(path):
    done = subprocess.run([hadolint(), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(compose_program() is None, reason="no Compose here")
def test_compose_accepts_the_file_and_demands_a_password(tmp_path):
    words = ["--env-file", "/dev/null", "--file", str(compose.FILE), "--profile", "*", "config", "--quiet"]
    line = [*compose_program(), *words]
    plain = {name: value for name, value in os.environ.items() if name != "POSTGRES_PASSWORD"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    given = subprocess.run(line, env=plain | {"POSTGRES_PASSWORD": "p@ss:w/rd$"}, **options)
    assert given.returncode == 0, given.stderr
    missing = subprocess.run(line, env=plain, **options)
    assert missing.returncode and "variable POSTGRES_PASSWORD is missing a value: give it in" in missing.stderr


def test_services_name_what_is_there():
    with pytest.raises(ValueError, match=r"POSTGRES_PASSWORD is missing a value: give it"):
        compose.services()
    services = compose.services(POSTGRES_PASSWORD="secret")
    assert set(services) == {"postgres", "mlflow", "train", "train-gpu"}
    for name, service in services.items():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert "healthcheck" in service or name.startswith("train")
    for service in (services["train"], services["train-gpu"]):
        assert service["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert service["read_only"] and service["tmpfs"] == ["/tmp:exec"]


def passwords(value: object) -> list[str]:
    """What is written in a tree under keys that name a password."""
    if isinstance(value, list):
        return [found for item in value for found in passwords(item)]
    if not isinstance(value, dict):
        return []
    own = [str(item) for key, item in value.items() if re.search("passw|secret|token", str(key), re.IGNORECASE)]
    return own + [found for item in value.values() for found in passwords(item)]


def test_no_password_is_in_the_file():
    text = compose.FILE.read_text()
    found = passwords(yaml.safe_load(text))
    assert len(found) == 2, "the database's, and that of the server that uses it"
    for password in found:
        assert re.fullmatch(r"\$\{POSTGRES_PASSWORD:\?[^{}]+\}", password), password
    assert not re.search(r"://[^/\s@]*:[^/\s@]*@", text), "nor in an address"


@pytest.mark.heavy
def test_mlflow_knows_the_options_and_lets_named_pages_change_things():
    from mlflow.cli import server
    from mlflow.server.security_utils import should_block_cors_request

    def options(**variables: str) -> dict:
        words = compose.services(POSTGRES_PASSWORD="x", **variables)["mlflow"]["command"]
        assert words[:2] == ["mlflow", "server"]
        return server.make_context("server", words[2:]).params

    plain, page = options(), "https://curves.example.org"
    assert plain["port"] == 5000 and plain["serve_artifacts"] and "mlflow:*" in plain["allowed_hosts"].split(",")
    for given, blocked in ((plain, True), (options(MLFLOW_ALLOWED_ORIGINS=f"https://a.example.org,{page}"), False)):
        origins = given["cors_allowed_origins"].split(",")
        assert should_block_cors_request(page, "POST", origins) is blocked
        assert not should_block_cors_request("http://localhost:5000", "POST", origins)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_base_of_another_python_fails_in_the_build(name):
    """The environment is made in one stage and runs in another, whose Python has to find its packages."""
    last = (ROOT / f"docker/{name}.Dockerfile").read_text().rpartition("\nFROM ")[2]
    copied, checked, user = (last.find(words) for words in ("COPY --from=builder /opt/venv", "RUN [", "\nUSER "))
    assert 0 < copied < last.find("PYTHONDONTWRITEBYTECODE=1") < checked < user
    assert last[checked:].startswith('RUN ["/opt/venv/bin/python", "-c", "import numpy"]\n')


def test_the_training_services_start_a_run_of_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = parse_arguments(compose.services(POSTGRES_PASSWORD="x")["train"]["command"])
    assert config.run.name == "quickstart"
    monkeypatch.undo()


@pytest.mark.skipif(images.why_not() is not None, reason=str(images.why_not()))
def test_an_image_gets_the_program_and_nothing_else(tmp_path, monkeypatch):
    """What .dockerignore lets through, as a real build sees it."""
    monkeypatch.setattr(images, "lab", lambda: tmp_path)
    images.write_settings(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    images.buildah("bud", "--isolation", "chroot", "--tag", "context", f"--file={tmp_path}/Dockerfile", str(ROOT))
    container = images.buildah("from", "--pull-never", "context").strip()
    folder = Path(images.buildah("mount", container).strip())
    try:
        sent = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    finally:
        images.buildah("rm", container)
    top = sorted({name.partition("/")[0] for name in sent})
    folders, files = ["configs", "data_pipeline", "docker", "gptoss_dist", "launch"], ["pyproject.toml", "setup.cfg"]
    assert top == ["LICENSE", "README.md", *folders, *files]
    assert {"launch/train.py", "docker/entrypoint.sh", "configs/quickstart.yaml"} <= set(sent)
    assert not [name for name in sent if "__pycache__" in name or "/benchmark" in name or ".egg-info" in name]
    assert sum(sent.values()) < 8e6


@pytest.mark.parametrize(
    "arguments, started",
    [
        (["--config", "a b.yaml"], "/opt/gptoss_dist/launch/train.py|--config|a b.yaml|"),
        ([], "/opt/gptoss_dist/launch/train.py|--help|"),
        (["python", "-m", "data_pipeline.prepare", "x"], "-m|data_pipeline.prepare|x|"),
    ],
)
@pytest.mark.parametrize("home, expected", [(None, "/tmp"), ("/nonexistent", "/tmp"), (str(ROOT), str(ROOT))])
def test_the_entry_point_starts_train_py_or_a_command(tmp_path, arguments, started, home, expected):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$HOME $USER"\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({} if home is None else {"HOME": home})
    line = ["sh", str(ROOT / "docker/entrypoint.sh"), *arguments]
    first, second = subprocess.run(line, env=variables, capture_output=True, text=True, check=True).stdout.split("\n")
    assert second == started
    assert first.split()[0] == expected and len(first.split()) == 2
