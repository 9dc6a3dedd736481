"""The command as a person uses it: files, page, MLflow, and mistakes in one line."""

import json
import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.support.recorded_runs import write_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """A function that runs the command in this process; returns its exit code."""
    import runpy

    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "launch/compare.py"))["main"]
    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs/a", seed=1, config={"optim.lr": 0.001, "run.seed": 0})
    write_run(tmp_path / "runs/b", seed=2, shift=-0.1, config={"optim.lr": 0.002, "run.seed": 0})
    write_run(tmp_path / "runs/c", seed=3, shift=-0.1, steps=390, config={"optim.lr": 0.004, "run.seed": 0})
    return [tmp_path / "runs" / name for name in "abc"]


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_three_runs(compare, runs, capsys):
    before = files_of(runs[0].parent)
    assert compare(*runs, "--at-tokens", "300k", "1.5M", "--output", "out") == 0
    told, complained = capsys.readouterr()
    assert "is better than a (lr 0.001) by 0.1" in told and " and c (lr 0.004)" in told
    assert "| optim.lr | 0.001 | 0.002 | 0.004 |" in told and "run.name" not in told
    assert "not logged there; --uri names a server" in complained and not Path("mlflow.db").exists()
    assert files_of(runs[0].parent) == before
    assert Path("out/comparison.md").read_text() in told
    found = json.loads(Path("out/comparison.json").read_text())
    assert found["equal"]["tokens"]["places"] == [3e5, 1.5e6]
    assert {one["shown"] for one in found["verdicts"][0]["pairs"]} == {True, False}
    assert {judged["axis"] for judged in found["verdicts"]} == {"tokens", "hours"}, "FLOPs per token are the same"
    page = Path("out/comparison.html").read_text()
    for sentence in (pair["sentence"] for pair in found["verdicts"][0]["pairs"]):
        assert sentence in unescape(page)
    assert page.count('<div class="figure"') == 4


def test_what_happened_at_one_step_is_one_mark(compare, runs):
    with open(runs[0] / "tracking/journal.jsonl", "a") as file:
        for step, kind in ((80, "stop"), (80, "resume"), (90, "skipped")):
            line = {"op": "event", "time": 1000.0, "step": step, "kind": kind, "text": f"{kind} at {step}"}
            file.write(json.dumps(line) + "\n")
    assert compare(*runs, "--output", "out") == 0
    page = Path("out/comparison.html").read_text()
    assert '["stopped, resumed","skipped step"]' in page.replace('", "', '","')


def test_validations_that_say_otherwise_are_named(compare, tmp_path, capsys):
    write_run(tmp_path / "a", seed=1, config={"optim.lr": 0.001})
    write_run(tmp_path / "b", seed=1, shift=-0.1, config={"optim.lr": 0.002})
    assert compare("a", "b", "--output", "out1") == 0
    told = capsys.readouterr().out
    assert "The lowest loss/val at 1.638M tokens is that of b" in told and "take neither" not in told
    lines = (tmp_path / "b/metrics.jsonl").read_text().replace('{"loss/val": 1', '{"loss/val": 3')
    (tmp_path / "b/metrics.jsonl").write_text(lines.replace('{"loss/val": 2', '{"loss/val": 3'))
    assert compare("a", "b", "--output", "out2") == 0
    told = capsys.readouterr().out
    assert "is better than a (lr 0.001)" in told and "is that of a" in told and "take neither for certain" in told


def test_a_sweep_is_fitted_and_predicts(compare, tmp_path, capsys):
    for number, steps in enumerate((50, 80, 130, 220, 400, 700)):
        write_run(tmp_path / f"s{number}", steps=steps, std=0.002, seed=number, config={"train.steps": steps})
    assert compare(*(f"s{n}" for n in range(6)), "--predict", "0.01", "0.1", "--output", "out") == 0
    fit = json.loads(Path("out/comparison.json").read_text())["fit"]
    assert [one["exaflops"] for one in fit["predictions"]] == [0.01, 0.1] and len(fit["runs"]) == 6
    for one in fit["predictions"]:  # the law of the tokens that the runs follow
        truth = 1.5 + 40.0 * (one["exaflops"] * 1e18 / 1.5e9) ** -0.3
        assert one["low"] < truth < one["high"] < truth + 0.3
    told = capsys.readouterr().out
    assert all(one["one_run"]["low"] < one["low"] for one in fit["predictions"])
    assert "interval of one run" in told and "chosen by losses that have noise" in told
    assert "## Loss against compute" in told and "train.steps differs" in told and "0.1 exaFLOPs" in told
    assert compare("s0", "s1", "--predict", "1", "--output", "other") == 2
    assert "no power law is fitted: it takes 5 runs or more" in capsys.readouterr().err
    for number in (3, 4, 5):  # which cheaper ones beat
        write_run(tmp_path / f"beaten{number}", steps=100 * number, seed=number, shift=0.5)
    beaten = ["beaten3", "beaten4", "beaten5"]
    assert compare("s0", "s1", "s2", *beaten, "--predict", "1", "--output", "other") == 2
    assert "3 that took 3; 3 more had cheaper rivals: --fit final takes these too" in capsys.readouterr().err
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no runs; give two folders of runs or more, or --experiment NAME"),
        (["runs/a"], "runs: 1 training run is no comparison; give two or more"),
        (["runs/a", "runs/a"], "1 training run is no comparison"),
        (["runs/a", "runs/missing"], "runs/missing/metrics.jsonl does not exist; give the folder of a run"),
        (["runs/a", "runs/b", "--at-tokens", "many"], "'many' is no amount; give a number above 0, such as 300k"),
        (["runs/a", "runs/b", "--filter", "x"], "--filter is for the runs of --experiment NAME; give one"),
        (["runs/a", "runs/b", "--predict", "-1"], "must be more than 0"),
        (["runs/a", "runs/b", "--fit", "none", "--predict", "1"], "takes its losses from a fit; leave out --fit none"),
        (["runs/a", "runs/b", "--output", "runs"], "--output runs exists already; name a new folder"),
        (["runs/a", "--experiment", "x"], "there is no such database of MLflow; name the server with --uri"),
        (["runs/a", "runs/empty"], "runs/empty: metrics.jsonl has no loss/train; give the folder of a training run"),
    ],
)
def test_mistakes_are_one_line(compare, runs, capsys, words, complaint):
    (runs[0].parent / "empty").mkdir()
    (runs[0].parent / "empty/metrics.jsonl").write_text('{"step": 1, "time": 5.0, "metrics": {"eval/x": 1.0}}\n')
    assert compare(*words) == 2
    told, complained = capsys.readouterr()
    assert complaint in complained and complained.count("\n") == 1 and complained.startswith("compare.py: ")
    assert not told and not Path("comparisons").exists()


def test_damage_and_hostile_names_do_no_harm(compare, runs, tmp_path, capsys):
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    lines[200], lines[201] = "{", lines[201].replace('"loss/train": ', '"loss/train": null, "x": ')
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evil = runs[1].rename(runs[1].with_name("<script>alert(1)</script>|`\x1b[31m".replace("/", "_")))
    (runs[2] / "config.yaml").write_text("{")
    (runs[2] / "tracking/journal.jsonl").write_text("garbage\n")
    assert compare(runs[0], evil, runs[2], "--output", "out") == 0
    told, complained = capsys.readouterr()
    assert "1 damaged line was passed over" in complained and "config.yaml" in complained
    page = Path("out/comparison.html").read_text()
    assert "\x1b" not in told and "\x1b" not in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "<script>alert" not in told


def test_other_vocabularies_are_not_judged(compare, tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, shift=-1, config={"model.vocab_size": 1024}, digest="e" * 64)
    assert compare("a", "b", "--predict", "1", "--output", "out") == 0
    told = capsys.readouterr().out
    assert "no power law is fitted: the losses of the runs are not comparable" in told
    assert "not comparable" in told and "bits per byte" in told and "is better than" not in told
    assert json.loads(Path("out/comparison.json").read_text())["verdicts"] == []


def test_a_copy_is_a_run_of_its_own_and_another_name_of_a_folder_is_not(compare, runs, capsys, monkeypatch):
    """Both have the id of the original in MLflow."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for folder in runs:
        (folder / "tracking/cursor.json").write_text(json.dumps({"run_id": "0a" * 16, "uri": "http://127.0.0.1:9"}))
    assert compare(*runs, "--no-mlflow", "--output", "out") == 0
    assert len(json.loads(Path("out/comparison.json").read_text())["runs"]) == 3
    capsys.readouterr()
    assert compare("runs/b", "./runs/b") == 2
    complained = capsys.readouterr().err
    assert "./runs/b is the same run as runs/b, and is compared once" in complained and "no comparison" in complained
    assert compare("runs/a", "runs/b", "--output", "again") == 0  # the server does not answer
    (line,) = capsys.readouterr().err.splitlines()
    assert "the page is not logged to MLflow at http://127.0.0.1:9: " in line
    assert sorted(path.name for path in Path("again").iterdir()) == [
        f"comparison.{kind}" for kind in ("html", "json", "md")
    ]


@pytest.mark.heavy
def test_the_page_is_logged_to_mlflow(compare, store, empty_store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps({"gptoss_dist.kind": "mine", "kind": "baseline"}))
    from mlflow import MlflowClient

    from gptoss_dist.tracking.tracker import sync

    client = MlflowClient(store)
    # As MLFLOW_EXPERIMENT_ID makes them: the name in the journal is that of another experiment.
    by_id = f'"gptoss_dist", "experiment_id": "{client.create_experiment("made-up")}"'
    for number in range(2):
        write_run(tmp_path / f"r{number}", steps=60, seed=number, config={"optim.lr": 0.1 * number})
        journal = tmp_path / f"r{number}/tracking/journal.jsonl"
        text = journal.read_text().replace("0a" * 16, f"{number}b" * 16)
        journal.write_text(text.replace('"experiment": "made-up"', f'"experiment": {by_id}'))
        sync(tmp_path / f"r{number}", store, pytest.fail)
    assert compare("--experiment", "made-up", "--uri", store) == 0
    (output,) = Path("comparisons").iterdir()
    assert output.name.startswith("made-up-") and "r0" in capsys.readouterr().out

    experiment = client.get_experiment_by_name("made-up")
    (logged,) = client.search_runs([experiment.experiment_id], "tags.`gptoss_dist.kind` = 'comparison'")
    assert logged.data.tags["kind"] == "baseline" and len(logged.data.tags["compared"].split(", ")) == 2
    assert not (output / "tracking").exists() and logged.data.params["runs"] == "r0, r1"
    assert logged.info.status == "FINISHED" and "mlflow.parentRunId" not in logged.data.tags
    names = {file.path for file in client.list_artifacts(logged.info.run_id)}
    assert names == {"comparison.html", "comparison.json", "comparison.md"}
    assert compare("r0", "r1", "--output", "folders") == 0
    assert len(client.search_runs([experiment.experiment_id], "tags.`gptoss_dist.kind` = 'comparison'")) == 2
    assert compare("--experiment", "made-up", "--no-mlflow", "--output", "again") == 0  # not a run to be compared
    assert len(json.loads(Path("again/comparison.json").read_text())["runs"]) == 2
    # On another server the experiment is found by its name: its id is of this one.
    shutil.copy(empty_store, "other.db")
    other = MlflowClient(f"sqlite:///{tmp_path}/other.db")
    assert compare("r0", "r1", "--uri", other.tracking_uri, "--output", "other") == 0
    (logged,) = other.search_runs([other.get_experiment_by_name("gptoss_dist").experiment_id])
    assert logged.data.tags["compared"].count(",") == 1


_HOSTS_OF_THE_BROWSER = (
    "accounts.google.com",
    "android.clients.google.com",
    "clients2.google.com",
    "clientservices.googleapis.com",
    "content-autofill.googleapis.com",
    "edgedl.me.gvt1.com",
    "mtalk.google.com",
    "optimizationguide-pa.googleapis.com",
    "redirector.gvt1.com",
    "update.googleapis.com",
    "www.google.com",
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.heavy
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_opens_offline_without_a_request(compare, runs, tmp_path, capsys):
    """Chromium writes down every request; the only one is for the page itself, and its figures are drawn."""
    assert compare(*runs, "--output", "out") == 0
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--proxy-server=127.0.0.1:9",  # whatever is asked for is refused
            f"--log-net-log={log}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            (tmp_path / "out/comparison.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout
    assert dom.count('class="main-svg"') >= 8 and dom.count("scatterlayer") >= 4
    assert "hours of training" in dom and "is better than a (lr 0.001)" in dom
    events = json.loads(log.read_text())
    kinds = {number: name for name, number in events["constants"]["logEventTypes"].items()}
    asked = [
        event["params"]["url"]
        for event in events["events"]
        if kinds[event["type"]] == "URL_REQUEST_START_JOB" and "url" in event.get("params", {})
    ]
    assert not [url for url in asked if url.startswith(("http", "ws")) and not _of_the_browser(url)], asked


def _of_the_browser(url):
    """What Chromium asks for by itself, whatever it shows; never a font or a script that a page might want."""
    return urlsplit(url).hostname in _HOSTS_OF_THE_BROWSER


@pytest.mark.slow
def test_fifty_long_runs_in_five_seconds_and_500_mb(tmp_path):
    """50 runs of 100,000 steps: five are written, the others are links to them with settings of their own."""
    steps = 100_000
    for number in range(5):
        rng = np.random.default_rng(number)
        more = {f"moe/load_cv/layer_{layer}": rng.random(steps) for layer in range(12)}
        more |= {"optim/grad_norm": rng.lognormal(size=steps), "moe/load_cv": rng.random(steps)}
        write_run(
            tmp_path / f"r{number}",
            steps=steps,
            seed=number,
            std=0.05,
            shift=-0.01 * number,
            more=more,
            validate_every=1000,
        )
    command = [sys.executable, ROOT / "launch/compare.py", "--no-mlflow"]
    first = [tmp_path / f"r{number}" for number in range(5)]
    subprocess.run([*command, *first, "--output", tmp_path / "cold"], check=True, capture_output=True)
    folders = []
    for number in range(50):
        source, folder = first[number % 5], tmp_path / f"s{number:02}"
        shutil.copytree(source, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        text = (source / "config.yaml").read_text()
        (folder / "config.yaml").unlink()
        (folder / "config.yaml").write_text(text.replace("lr: 0.001", f"lr: 0.{number + 10}"))
        folders.append(folder)
    limited = (
        "import re, runpy, sys, time\n"
        "began = time.process_time()\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        # Not the resource module's figure, which begins with that of the process that started this one.
        "peak = int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "print(time.process_time() - began, peak / 1024, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, command[1], *folders, "--no-mlflow", "--output", tmp_path / "warm"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seconds, megabytes = map(float, done.stderr.splitlines()[-1].split())
    assert seconds < 5 and megabytes < 500, (seconds, megabytes)
    assert len(json.loads((tmp_path / "warm/comparison.json").read_text())["runs"]) == 50
