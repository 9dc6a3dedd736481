"""launch/submit.py: the script that it writes, what it keeps, and what it refuses."""

import os
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gptoss_dist.cluster import follow, read_revision
from gptoss_dist.config import load_config
from tests.support.ranks import ROOT

main = runpy.run_path(str(ROOT / "launch/submit.py"))["main"]

SBATCH = """#!/bin/bash
cp "${@: -1}" "$SEEN"
echo "77;cluster"
"""


@pytest.fixture
def submit(settings, tmp_path, monkeypatch, capfd):
    """A function that submits a run from `tmp_path` with an sbatch that takes anything; returns code and output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.sbatch"))
    monkeypatch.delenv("MLFLOW_TAGS", raising=False)

    def submit_run(*words: str) -> tuple[int, str]:
        code = main(["--config", str(settings), "--run.name", "mine", "--run.dir", "runs/mine", *words])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    yield submit_run
    monkeypatch.chdir(ROOT)


def test_a_dry_run_prints_a_script_and_does_nothing_else(submit, tmp_path):
    code, script = submit(
        *shlex.split(
            "--nodes 8 --gpus-per-node=8 --partition P --time 24:00:00 --account A --qos Q --launcher deepspeed "
            "--signal-before-s 600 --most-stalled-starts 5 --dry-run --resume auto"
        ),
    )
    assert code == 0 and not (tmp_path / "runs").exists() and not (tmp_path / "seen.sbatch").exists()
    *lines, hint = script.splitlines()
    assert hint.startswith("submit.py: no processors or memory are asked for")
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--job-name=mine",
        "--nodes=8",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--partition=P",
        "--account=A",
        "--qos=Q",
        "--time=24:00:00",
        "--signal=B:USR1@600",
        "--requeue",
        "--open-mode=append",
        "--output=runs/mine/job/1/%j.log",
        f"--chdir={tmp_path}",
    ):
        assert f"#SBATCH {line}" in lines
    assert not [line for line in lines if line.startswith("#SBATCH --array")]
    assert "export LAUNCHER=deepspeed PROCESSES_PER_NODE=8" in script and "MOST_STALLED_STARTS=5" in script
    assert lines[-1] == f"exec bash {ROOT}/launch/slurm/job.sh --config runs/mine/job/1/config.yaml --resume auto"
    assert_is_shell("\n".join(lines))


def assert_is_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["apptainer_example", "modules_example", "pyxis_example"])
def test_scripts_of_the_example_sites(submit, name):
    file = ROOT / f"configs/cluster/{name}.yaml"
    site = yaml.safe_load(file.read_text())
    mounts = site.get("container_mounts", [])
    data = f"{mounts[0].split(':')[1]}/tokens" if mounts else "data"
    code, script = submit(*shlex.split(f"--site {file} --nodes 2 --gpus-per-node 8 --data.path {data} --dry-run"))
    assert code == 0 and "no processors" not in script, script
    assert f"#SBATCH --cpus-per-task={8 * site['cpus_per_gpu']}" in script
    for key in ("partition", "account", "qos", "constraint"):
        assert f"#SBATCH --{key}={site[key]}\n" in script if key in site else f"--{key}" not in script
    for line in site["sbatch"]:
        assert f"#SBATCH {line}\n" in script
    modules = site.get("modules", [])
    assert "".join(f"module load {module}\n" for module in modules) in script
    assert ("module purge\nmodule load " in script) == bool(modules)
    for line in site.get("setup", []):
        assert f"\n{line}\n" in script
    for key, value in site["environment"].items():
        assert f"export {key}={value}\n" in script
    if mounts:
        runtime, image = site["container_runtime"], site["container_image"]
        assert f"export CONTAINER_RUNTIME={runtime} CONTAINER_IMAGE={image}\n" in script
        names = ",".join(site["environment"])
        assert f"export CONTAINER_MOUNTS={','.join(mounts)} CONTAINER_ENV={names}\n" in script
    assert "CONTAINER" in script if mounts else "CONTAINER" not in script
    assert f"PYTHON={'python' if mounts else sys.executable}\n" in script
    assert_is_shell(script)


def test_options_win_over_the_site_and_words_are_quoted(submit, tmp_path, corpus):
    site = {
        "partition": "slow",
        "sbatch": ["--exclusive", "--gpus-per-node=h100:8", "--time=1"],
        "container_runtime": "apptainer",
        "container_mounts": [str(corpus)],
        "environment": {"NOTE": "it's $HOME; rm x", "NCCL_IB_TIMEOUT": 22},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    options = "--site site.yaml --partition fast --time 60 --gpus-per-node 8 --container 'my image.sif' --dry-run"
    code, script = submit(*shlex.split(options), "--data.path", str(corpus))
    assert code == 0 and "--partition=fast" in script and "slow" not in script
    assert "CONTAINER_IMAGE='my image.sif'" in script and "export NCCL_IB_TIMEOUT=22\n" in script
    order = ["--gpus-per-node=8", "--gpus-per-node=h100:8", "--time=1\n", "--time=60\n"]  # the last one counts
    assert sorted(order, key=script.index) == order
    said = subprocess.run(
        ["bash"], input=script.replace("exec bash", 'printf %s "$NOTE" #'), capture_output=True, text=True
    )
    assert said.stdout == "it's $HOME; rm x", said.stderr


def test_what_is_submitted_is_kept(submit, tmp_path):
    code, said = submit("--nodes", "2", "--optim.lr", "0.25")
    folder = tmp_path / "runs/mine/job/1"
    assert code == 0 and "submitted job 77;" in said and "log in runs/mine/job/1/77.log" in said
    assert (folder / "job.sbatch").read_text() == (tmp_path / "seen.sbatch").read_text()
    config = load_config(folder / "config.yaml")
    assert config.optim.lr == 0.25 and str(config.folder) == "runs/mine"
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (folder / "revision.txt").read_text().splitlines()[:1] == [commit.strip() or "unknown"]
    assert submit()[0] == 0 and (tmp_path / "runs/mine/job/2/job.sbatch").exists()


def test_a_sweep_has_a_run_for_each_combination(submit, tmp_path):
    code, said = submit("--array", "optim.lr=1e-3,3e-4", "--tracking.mlflow", "true", "--dry-run")
    assert code == 0 and """export MLFLOW_TAGS='{"mlflow.parentRunId": "(an id, when it is submitted)"}'""" in said
    code, said = submit("--array", "optim.lr=1e-3,3e-4", "--array", "optim.betas=[0.9,0.95],[0.8,0.9]", "--nodes", "1")
    assert code == 0 and "#SBATCH --array=0-3\n" in said and "--config runs/mine/job/1/%a.yaml" in said
    runs = [load_config(tmp_path / f"runs/mine/job/1/{number}.yaml") for number in range(4)]
    assert [(run.optim.lr, run.optim.betas) for run in runs] == [
        (lr, betas) for lr in (1e-3, 3e-4) for betas in ([0.9, 0.95], [0.8, 0.9])
    ]
    assert [(run.run.name, str(run.folder)) for run in runs] == [(f"mine-{n}", f"runs/mine-{n}") for n in range(4)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nodes", "0"], "nodes=0 must be positive"),
        (["--time", "tomorrow"], "time=tomorrow is no time limit; give it as 24:00:00"),
        (["--array", "lr"], "array=lr is no KEY=A,B,..."),
        (["--array", "optim.lr=1,,2"], "has an empty value"),
        (["--array", "optim.lrs=1,2"], "did you mean --optim.lr?"),
        (["--array", "run.name=a,b"], "each run has a run.name of its own already"),
        (["--array", "run.seed=0,1", "--follow"], "follow=true is for one job"),
        (["--container", "x.sif"], "container=x.sif needs something that starts containers; set container_runtime"),
        (["--partition", "a b"], "partition='a b' cannot stand in a line of #SBATCH"),
        (["--site", "nowhere.yaml"], "nowhere.yaml"),
        (["--launcher", "deepspeed", "--max-restarts", "1"], "max_restarts=1 is torchrun's"),
        (["--tracking.uri", "http://me:secret@host"], "set MLFLOW_TRACKING_URI"),
        (["--run.dir", "runs/a b"], "run.dir='runs/a b/job/1'"),
        (["--nodse", "2"], "unrecognized option --nodse; did you mean --nodes?"),
        (["--node=2"], "unrecognized option --node; did you mean --nodes?"),
        (["--time", "0-0:06"], "time=0-0:06: the job would be asked to save at once, as signal_before_s=300"),
        (["--time", "5:30"], "time=5:30: the job would be asked to save at once"),
        (["--signal-before-s", "90000"], "signal_before_s=90000 must be"),
        (
            ["--array", "optim.lr=1,2", "--site", "typed.yaml", "--gpus-per-node", "4"],
            "gpus_per_node=4 is not the number",
        ),
        (["--gpus-per-node", "8", "--processes-per-node", "16"], "processes_per_node=16 is more than gpus_per_node=8"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_submitted(submit, tmp_path, words, message):
    (tmp_path / "typed.yaml").write_text("sbatch: [--exclusive, --gpus-per-node=h100:8]")
    code, said = submit(*words)
    (line,) = said.splitlines()
    assert code == 2 and line.startswith("submit.py: ") and message in line, said
    assert "secret" not in line and not (tmp_path / "seen.sbatch").exists()


@pytest.mark.parametrize(
    "site, message",
    [
        ({"queue": "x"}, "queue"),
        ({"sbatch": ["exclusive"]}, "sbatch='exclusive' is no option of sbatch; give it with its dashes"),
        ({"environment": {"A B": "1"}}, "environment='A B' is no name of a variable"),
        ({"container_image": "x"}, "container_image=x needs container_runtime"),
        ({"container_runtime": "docker"}, "container_runtime"),
        ({"container_mounts": ["a,b"]}, "container_mounts='a,b' has a comma"),
        ({"cpus_per_gpu": 0}, "cpus_per_gpu=0 must be positive"),
        (
            {"sbatch": ["--ntasks-per-node=8"]},
            "sbatch='--ntasks-per-node=8' is what the script sets itself; leave it out",
        ),
        ({"environment": {"OMP": True}}, "environment.OMP=True is no text; put it in quotes"),
        ({"environment": {"OMP": None}}, "environment"),
    ],
)
def test_mistakes_in_a_site_name_its_file(submit, tmp_path, site, message):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    code, said = submit("--site", "site.yaml")
    (line,) = said.splitlines()
    assert code == 2 and "site.yaml" in line and message in line


def test_a_container_must_see_what_a_run_reads_and_writes(submit, tmp_path, corpus):
    outside, renamed = tmp_path.parent / "outside", tmp_path.parent / "host"
    outside.mkdir()
    (tmp_path / "linked").symlink_to(outside)

    def refusal(*words: str, mounts: tuple = (str(corpus),)) -> str:
        site = {"container_runtime": "pyxis", "container_image": "x", "container_mounts": list(mounts)}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
        code, said = submit("--site", "site.yaml", "--dry-run", "--data.path", str(corpus), *words)
        assert code in (0, 2)
        return "" if code == 0 else said.splitlines()[-1]

    assert refusal() == ""
    remedy = f"; add {outside}:{outside} to container_mounts in the file of --site"
    assert refusal("--checkpoint.dir", f"{outside}/new") == (
        f"submit.py: checkpoint.dir={outside}/new is in no folder that the container sees under its own name{remedy}"
    )
    assert f"run.dir={tmp_path}/linked/run, which is {outside}/run, is in" in refusal("--run.dir", "linked/run")
    assert refusal("--data.path", f"{outside}/data") == (
        f"submit.py: data.path={outside}/data is in no folder that the container sees{remedy}"
    )
    assert f"init.from={outside}/model is in" in refusal("--init.from", f"hf:{outside}/model")
    mounts = (str(corpus), f"{renamed}:{outside}:ro")
    assert refusal("--data.path", f"{outside}/data", mounts=mounts) == ""
    assert "under its own name" in refusal("--run.dir", f"{outside}/run", mounts=mounts)


def test_checkpoints_and_a_missing_slurm_are_said(submit, tmp_path, monkeypatch):
    (tmp_path / "runs/mine/checkpoints/step_00000004").mkdir(parents=True)
    code, said = submit()
    assert code == 2 and "holds checkpoints already; continue with --resume auto" in said
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    code, said = submit("--resume", "auto")
    assert code == 2 and "submit.py: sbatch refused: invalid partition" in said
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = submit("--resume", "auto")
    assert code == 2 and "sbatch is not on this machine" in said


def test_the_log_is_followed_to_the_end(submit, tmp_path):
    squeue = tmp_path / "bin/squeue"
    squeue.write_text("#!/bin/sh\necho step é >>runs/mine/job/1/77.log\necho ${STATE:-COMPLETED}\n")
    squeue.chmod(0o755)
    code, said = submit("--follow")
    assert code == 0 and said.splitlines()[-2:] == ["step é", "job 77: COMPLETED"]


def test_slurm_is_asked_seldom_and_may_be_silent_for_a_while(tmp_path, monkeypatch):
    answers = ["", "RUNNING", *[""] * 19, "COMPLETED"]
    now, asked = [0.0], []

    def squeue(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess:
        asked.append(now[0])
        answer = answers.pop(0)
        return subprocess.CompletedProcess(command, not answer, answer, "Unable to contact slurm controller")

    monkeypatch.setattr(subprocess, "run", squeue)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert follow("7", tmp_path / "log", lambda text: None) == "COMPLETED"
    assert asked[:6] == [0, 2, 6, 14, 30, 60]
    answers[:] = [""] * 100
    with pytest.raises(ValueError, match="Unable to contact"):
        follow("7", tmp_path / "log", lambda text: None)
    assert 600 < asked[-1] - asked[22] < 640


def test_a_character_that_is_half_written_is_followed(tmp_path, monkeypatch):
    text, parts, log = "a é".encode(), [], tmp_path / "log"
    log.write_bytes(text[:-1])

    def squeue(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 0, "COMPLETED" if log.read_bytes() == text else "RUNNING", "")

    monkeypatch.setattr(subprocess, "run", squeue)
    monkeypatch.setattr(time, "sleep", lambda seconds: log.write_bytes(text))
    assert follow("7", log, parts.append, interval_s=0.0) == "COMPLETED"
    assert parts == ["a ", "é"]


def test_a_patch_makes_the_commit_into_what_ran(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *words], cwd=tmp_path / "code", capture_output=True, text=True, check=True
        ).stdout

    code = tmp_path / "code"
    code.mkdir()
    git("init", "-q")
    (code / "old.py").write_text("a = 1\n")
    git("add", "."), git("commit", "-qm", "one")
    clean = read_revision(code)
    assert str(clean) == git("rev-parse", "HEAD")[:12] and not clean.patch

    (code / "old.py").write_text("a = 2\n")
    (code / "new.py").write_text("b = 3\n")
    (code / "data.bin").write_bytes(b"0" * (2**20 + 1))
    before = git("status", "--porcelain")
    revision = read_revision(code)
    assert str(revision).endswith(" and uncommitted changes") and revision.left_out == ("data.bin",)
    assert git("status", "--porcelain") == before
    git("clone", "-q", ".", "../copy")
    subprocess.run(["git", "apply"], cwd=tmp_path / "copy", input=revision.patch, check=True)
    assert [(tmp_path / "copy" / name).read_text() for name in ("old.py", "new.py")] == ["a = 2\n", "b = 3\n"]
    assert read_revision(Path("/")).commit == "unknown"
