"""launch/prove_gpu.sh: its report is there and true however the proof ends; its items run here at tiny size."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from gptoss_dist.config import parse_arguments
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.tracking.metrics import StepTimer
from launch.benchmarks.prove_gpu import driver, environment, probe
from launch.benchmarks.prove_gpu.checks import kernels, runs, steps, syncs
from launch.benchmarks.prove_gpu.checks.commands import run_command
from launch.benchmarks.prove_gpu.driver import judge
from launch.benchmarks.prove_gpu.environment import Python
from launch.benchmarks.prove_gpu.findings import Findings, read_findings
from launch.benchmarks.prove_gpu.items import ITEMS
from tests.support.proofs import HANG, fake, proof_of
from tests.support.ranks import run

ROOT = Path(__file__).parents[2]
ITEM_OF = {item.name: item for item in ITEMS}


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@pytest.mark.heavy
def test_every_item_has_its_result_and_none_stops_another(tmp_path):
    items = [
        fake("right", "check(True); say('figure', value=1234.5, unit='ms', note='a | note')"),
        fake("wrong", "check(True); check(False)"),
        fake("crash", "check(True); sys.exit('the last words')"),
        fake("silent", "print('nothing')"),
        fake("slow", "check(True); say('slow', detail='0.1, at least 0.2 wanted')"),
        fake("hang", HANG, limit_s=2.0),
        fake("too long for what is left", "check(True)", least_s=1000.0),
        fake("last", "check(True)"),
    ]
    proof, seen, ended = proof_of(tmp_path, items), [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            if (path := proof.report.folder / "report.json").exists():
                seen.append(json.loads(path.read_text())["state"])  # whole at any moment

    reader = threading.Thread(target=read)
    reader.start()
    code = driver.run(proof, items, install=False, python=sys.executable)
    ended.set()
    reader.join()
    assert code == 1 and len(seen) > 20
    content = json.loads((proof.report.folder / "report.json").read_text())
    found = {item["name"]: (item["result"], item["reason"]) for item in content["items"]}
    assert found == {
        "right": ("PASS", ""),
        "wrong": ("FAIL", "wrong: a name: the detail"),
        "crash": ("FAIL", "ended with exit code 1: the last words"),
        "silent": ("FAIL", "it ended without checking anything"),
        "slow": ("SLOW", "a name: 0.1, at least 0.2 wanted"),
        "hang": ("FAIL", "not done in its time limit of 2 s; 1 checks were done by then, none wrong"),
        "too long for what is left": ("SKIPPED", found["too long for what is left"][1]),
        "last": ("PASS", ""),
    }
    assert re.fullmatch(r"no time: 1\d\d s are left, and it needs 1000 s", found["too long for what is left"][1])
    assert not is_running(int(proof.report.item("hang")["texts"][0]["text"])), "what an item started outlived it"
    text = (proof.report.folder / "report.md").read_text()
    assert "| a name | 1,234.5 ms | a \\| note |" in text and "finished" in text and "| [slow](#slow) | SLOW |" in text


def test_the_budget_cuts_an_item_which_is_no_failure(tmp_path):
    items = [fake("cut", HANG), fake("not reached", "check(True)", least_s=1.0)]
    proof = proof_of(tmp_path, items, seconds=driver.RESERVE_S + 1.5)
    assert driver.run(proof, items, install=False, python=sys.executable) == 0
    cut, rest = proof.report.content["items"]
    assert cut["result"] == "SKIPPED" and "time was up" in cut["reason"] and len(cut["checks"]) == 1
    assert rest["result"] == "SKIPPED" and "no time" in rest["reason"] and rest["seconds"] is None


SCRIPT = """
import sys
from pathlib import Path
from launch.benchmarks.prove_gpu import driver
from tests.support.proofs import HANG, fake, proof_of
driver.signal.signal(driver.signal.SIGTERM, driver._stop)
driver.signal.signal(driver.signal.SIGINT, driver._stop)
items = [fake("first", "check(True)"), fake("second", HANG), fake("third", "check(True)")]
sys.exit(driver.run(proof_of(Path(sys.argv[1]), items), items, install=False, python=sys.executable))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_report_survives_its_proof(tmp_path, number):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env)
    said = wait_for(lambda: [f for f in read_findings(tmp_path / "work/second.jsonl") if f["kind"] == "text"])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    code = process.wait(60)
    wait_for(lambda: not any(is_running(int(child)) for child in children))
    content = json.loads((tmp_path / "report/report.json").read_text())
    results = [(item["result"], item["reason"]) for item in content["items"]]
    text = (tmp_path / "report/report.md").read_text()
    if number == signal.SIGKILL:
        assert results == [("PASS", ""), ("RUNNING", ""), ("WAITING", "")] and content["state"] == "running"
        os.kill(int(said[0]["text"]), signal.SIGKILL)  # of a killed proof the item dies, and not what it started
    else:
        stopped = f"stopped by {number.name}"
        assert code == 128 + number and content["state"] == stopped and stopped in text
        assert results == [("PASS", ""), ("SKIPPED", f"{stopped} while it ran"), ("SKIPPED", stopped)]
        assert len(content["items"][1]["checks"]) == 1 and not is_running(int(said[0]["text"]))
    assert "| [first](#first) | PASS |" in text


@pytest.mark.parametrize(
    "words, says",
    [
        (["--minutes", "0"], "argument --minutes: '0' is not a number of minutes; give one above 0"),
        (["--minutes", "nan"], "argument --minutes: 'nan' is not a number of minutes"),
        (["--minutes", "1e9"], "argument --minutes: '1e9' is not a number of minutes"),
        (["--minutes", "nine"], "argument --minutes: 'nine' is not a number of minutes"),
        (["--only", "502"], "--only 502: no such item; choose from gpu-tests, attention"),
        (["--rehearse", "--output", "reported"], "reported: holds a report already; choose another folder"),
        (["--rehearse", "--output", "file/below"], "file/below: cannot be written (Not a directory); choose another"),
        ([], "this machine has no NVIDIA GPU (nvidia-smi lists none); --rehearse runs on the CPU"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "has_gpu", lambda: False)
    Path("reported").mkdir()
    Path("reported/report.json").touch()
    Path("file").touch()
    with pytest.raises(SystemExit) as exit_:
        driver.main(words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and says in error and error.count("prove_gpu.sh: error: ") == 1
    assert sorted(map(str, Path().rglob("*"))) == ["file", "reported", "reported/report.json"]


def a_python(path: str, missing: tuple[str, ...] = (), cuda: bool = True) -> Python:
    return Python(path, "3.12.3", {"torch": "2.13.0"}, list(missing), {"name": "NVIDIA H200"} if cuda else None)


@pytest.mark.parametrize(
    "there, code, chosen, how",
    [
        ({"venv": a_python("venv")}, None, "venv", "venv has all that is needed"),
        ({"venv": a_python("venv", cuda=False), "path": a_python("path")}, None, "path", "path has all"),
        ({"path": a_python("path", ("mlflow",))}, 0, "new", "installed into .*, because path lacks mlflow"),
        ({"path": a_python("path", ("mlflow",))}, 1, "path", "path has to do: path lacks mlflow; .* exit code 1"),
        (
            {"venv": a_python("venv", ("a", "b")), "path": a_python("path", ("c",))},
            None,
            "path",
            "path has to do: venv lacks a, b; path lacks c; launch/install.sh took over 7 s",
        ),
        ({"venv": a_python("venv", cuda=False)}, 1, None, "venv its torch 2.13.0 sees no GPU; .* exit code 1"),
        ({}, 1, None, "no Python with torch; launch/install.sh ended with exit code 1"),
    ],
)
def test_what_is_there_is_used_before_anything_is_installed(tmp_path, monkeypatch, there, code, chosen, how):
    installed = []

    def install(command, *_):
        installed.append(command[1:])
        return code

    def probe(path, env):
        return there.get(path) or (a_python("new") if installed and code == 0 else None)

    monkeypatch.setattr(environment, "candidates", lambda: list(there))
    monkeypatch.setattr(environment, "probe", probe)
    monkeypatch.setattr(environment, "run_bounded", install)
    python, said = environment.find_python({}, tmp_path / "log", rehearse=False, install=True, seconds=7.0)
    assert (python and python.path) == chosen and re.match(how, said), said
    enough = any(python.why_not(rehearse=False) is None for python in there.values())
    assert installed == ([] if enough else [[str(ROOT / "launch/install.sh"), "--extras", "test"]])
    installed.clear()
    environment.find_python({}, tmp_path / "log", rehearse=False, install=False, seconds=7.0)
    assert not installed


def test_the_probe_reads_what_setup_cfg_asks_for(capsys):
    probe.main()
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == [] and found["python"] == sys.version.split()[0]
    assert {"torch", "jsonargparse", "ruamel.yaml", "megablocks", "pytest"} <= found["versions"].keys()


def test_floors_and_what_is_no_number(tmp_path):
    findings = Findings(tmp_path / "real", rehearse=False)
    findings.floor("reached", 1.0, "x", least=1.0)
    findings.floor("missed", 0.5, "x", least=1.0)
    findings.floor("too many", 3.0, most=2.0)
    findings.floor("unknown", float("nan"), least=1.0)
    found = read_findings(tmp_path / "real")
    assert [f["name"] for f in found if f["kind"] == "slow"] == ["missed", "too many", "unknown"]
    assert json.loads((tmp_path / "real").read_text().splitlines()[-2])["value"] is None
    rehearsal = Findings(tmp_path / "rehearsal", rehearse=True)
    rehearsal.floor("missed", 0.5, least=1.0)
    assert [f["kind"] for f in read_findings(tmp_path / "rehearsal")] == ["figure"]


def test_waits_of_the_host_are_counted_by_stack():
    """Only torch's own warnings, only in the steps that count, each by where it comes from."""
    counter = syncs.SyncCounter(first=3, last=4)

    def reads_the_device() -> None:
        warnings.warn(f"{syncs.WARNING} (Triggered internally ...)", stacklevel=1)

    timer, start = StepTimer("cpu"), StepTimer.start
    with warnings.catch_warnings(record=True), counter.counting():
        for step in range(1, 6):
            timer.start()
            for _ in range(step):
                reads_the_device()
            warnings.warn("another warning", stacklevel=1)
    assert StepTimer.start is start
    assert counter.step == 5 and counter.per_step == 3.5
    ((stack, count),) = counter.stacks.items()
    assert count == 7 and stack.splitlines()[-1].startswith("tests/launch/test_prove_gpu.py:")
    assert "reads_the_device: warnings.warn(" in stack and "site-packages" not in stack


def test_the_head_of_a_profile_names_kernels_and_their_own_time():
    table = """-----  ---
               Name    Self CPU %      Self CPU   Self CUDA   Self CUDA %    # of Calls
-----  ---
  void kernel<a, b>(int)     0.00%       0.000us     1.500ms        60.00%            12
            aten::mm         5.00%       1.000us     1.000ms        40.00%             3
-----  ---
Self CUDA time total: 2.5ms
"""
    assert [line.split("  ")[0] for line in steps.head_of_table(table).splitlines()] == [
        "Name",
        "void kernel<a, b>(int)",
        "aten::mm",
    ]
    assert steps.head_of_table(table).splitlines()[1].split()[-3:] == ["1.500ms", "60.00%", "12"]


def test_the_sizes_are_those_that_the_report_names(tmp_path):
    """The models at full size, which no test can train here."""
    findings = Findings(tmp_path / "found", rehearse=False)
    of_20b = dataclasses.asdict(ModelConfig.from_yaml(ROOT / "configs/model/gptoss_20b.yaml"))
    part, run_502m = steps.run_20b_slice(findings), steps.run_502m(findings, {"train.compile": True})
    layers = {"num_hidden_layers": 2, "layer_types": of_20b["layer_types"][:2]}
    assert dataclasses.asdict(part.model) == of_20b | layers
    assert run_502m.model == ModelConfig.from_yaml(ROOT / "configs/model/gptoss_502m.yaml") and run_502m.train.compile
    for config, samples in ((part, 4), (run_502m, 8)):
        train = config.train
        assert (train.micro_batch_size, config.data.seq_len, train.gradient_accumulation) == (samples, 4096, 1)
        assert train.precision == "bf16"


def assert_passes(path: Path) -> list[dict]:
    found = read_findings(path)
    assert judge(0, 60.0, 60.0, found, path) == ("PASS", ""), found
    return found


@pytest.mark.parametrize("item", [kernels.attention, kernels.grouped_gemm])
def test_kernels_are_rehearsed(tmp_path, item):
    item(Findings(tmp_path / "found", rehearse=True), tmp_path)
    assert len([f for f in assert_passes(tmp_path / "found") if f["kind"] == "check"]) >= 8


def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    right = kernels.sink_attention

    def without_sinks(q, k, v, sinks, *, backend, **options):
        return right(q, k, v, sinks if backend == "reference" else sinks - 100, backend=backend, **options)

    monkeypatch.setattr(kernels, "sink_attention", without_sinks)
    kernels.attention(Findings(tmp_path / "found", rehearse=True), tmp_path)
    result, reason = judge(0, 60.0, 60.0, read_findings(tmp_path / "found"), tmp_path / "found")
    assert result == "FAIL" and "flash, bfloat16, 20B, full, T=96: off by" in reason


def test_a_kernel_that_breaks_is_one_finding_and_the_others_are_checked(tmp_path, monkeypatch):
    right = kernels.sink_attention

    def breaks_within_documents(*inputs, backend, documents=None, **options):
        if documents is not None and backend == "flash":
            raise RuntimeError("CUDA error:\n  no kernel image")
        return right(*inputs, backend=backend, documents=documents, **options)

    monkeypatch.setattr(kernels, "sink_attention", breaks_within_documents)
    kernels.attention(Findings(tmp_path / "found", rehearse=True), tmp_path)
    checks = [f for f in read_findings(tmp_path / "found") if f["kind"] == "check"]
    wrong = [check["detail"] for check in checks if not check["right"]]
    assert len(checks) == 12 and wrong == 2 * ["RuntimeError: CUDA error: no kernel image"]


def rehearse(work: Path, name: str) -> list[dict]:
    module = ITEM_OF[name].words[1].rpartition(".")[2]
    found = work / f"{name}.jsonl"
    options = ["--rehearse", "--findings", str(found), "--work", str(work)]
    run(f"launch/benchmarks/prove_gpu/checks/{module}.py", name, *options, cwd=ROOT)
    return assert_passes(found)


@pytest.mark.distributed
def test_training_items_are_rehearsed(tmp_path):
    checks = [f["name"] for f in rehearse(tmp_path, "resume") if f["kind"] == "check"]
    assert "the last checkpoint is equal bit for bit" in checks
    rehearse(tmp_path, "variants")
    found = rehearse(tmp_path, "syncs")
    assert [f["value"] for f in found if f["kind"] == "figure" and "synchronisations" in f["name"]] == [None, None]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.compiled
def test_the_whole_rehearsal(tmp_path):
    line = ["sh", str(ROOT / "launch/prove_gpu.sh"), "--rehearse", "--minutes", "30", "--output", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    content = json.loads((tmp_path / "out/report.json").read_text())
    results = {item["name"]: item["result"] for item in content["items"]}
    assert results == dict.fromkeys(["environment", *ITEM_OF], "PASS"), done.stderr
    assert done.returncode == 0 and content["rehearsal"] and "the figures mean nothing" in content["note"]
    assert "the figures mean nothing" in (tmp_path / "out/report.md").read_text()
    assert content["versions"]["torch"] and content["code"]["commit"] and content["machine"]["cpu"]


def test_the_documents_name_every_item_and_no_other():
    status, page = ((ROOT / "docs" / name).read_text() for name in ("status.md", "prove_gpu.md"))
    proven = status[status.index("## Needs a GPU: kernels") : status.index("## Needs several GPUs")]
    last_cells = " ".join(re.findall(r"\| ([^|]*) \|$", proven, re.MULTILINE))
    assert set(re.findall(r"`([^`]+)`", last_cells)) == set(ITEM_OF)
    limits = dict(re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) s \|$", page, re.MULTILINE))
    assert limits == {item.name: f"{item.limit_s:.0f}" for item in ITEMS}


def test_a_command_that_fails_is_named(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('to', sys.argv[1])\nsys.exit(int(sys.argv[2]))\n")
    assert run_command([str(script), "read", "0"], fork=False) == "to read\n"
    with pytest.raises(SystemExit, match=r"script\.py ended with exit code 3; its error is above"):
        run_command([str(script), "read", "3"], fork=False)
    assert capfd.readouterr().out.count("to read") == 2


def test_the_settings_of_the_real_runs_are_accepted(tmp_path, monkeypatch):
    """Those that only a GPU sees: a refusal that is new must not be found out there."""
    accepted = []

    def only_parse(words, *, fork):
        if words[0].endswith("train.py"):
            accepted.append(parse_arguments(words[1:])[0])
            raise SystemExit("parsed")
        return ""

    monkeypatch.setattr(runs, "run_command", only_parse)
    findings = Findings(tmp_path / "found", rehearse=False)
    runs.variants(findings, tmp_path)
    for item in (runs.quickstart, runs.resume, runs.zero_2):
        with pytest.raises(SystemExit, match="parsed"):
            item(findings, tmp_path)
    assert [config.run.name for config in accepted] == [
        "compiled",
        "replay",
        "varlen",
        "quickstart",
        "straight",
        "fsdp",
    ]
