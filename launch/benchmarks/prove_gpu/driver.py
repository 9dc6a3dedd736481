"""Prove on a machine with one CUDA GPU what a CPU cannot show, and leave one report.

    sh launch/prove_gpu.sh [--minutes 9] [--output DIR] [--only ITEM ...] [--no-install]
    sh launch/prove_gpu.sh --rehearse

Items run one after the other, in the order of their value, each for so long and no longer, until the time is up:
{items}

DIR/report.md and DIR/report.json are written anew after each of them, so that they are there however the proof ends;
DIR/logs has what the items printed. The exit code is 1 if an item is FAIL, 2 after a mistake on the command line.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.benchmarks.prove_gpu.bounded import run_bounded
from launch.benchmarks.prove_gpu.environment import Python, find_python
from launch.benchmarks.prove_gpu.findings import ROOT, read_findings
from launch.benchmarks.prove_gpu.items import ITEMS, Item
from launch.benchmarks.prove_gpu.machine import describe_code, describe_machine, has_gpu
from launch.benchmarks.prove_gpu.report import FAIL, PASS, SKIPPED, SLOW, Report

ENVIRONMENT = "environment"
INSTALL_SHARE = 0.6
"""The most of the time that an installation may take: a proof of nothing would be the end of it."""
REHEARSAL_PATIENCE = 5
"""Times the limits of the items: a rehearsal shares slow cores with others, and what is slow is not its subject."""
RESERVE_S = 2.0
"""Kept for the last words of the report."""


class Stopped(BaseException):
    """A signal asks the proof to end."""


@dataclass(frozen=True)
class Proof:
    """What the items of a proof have in common."""

    report: Report
    work: Path
    """A folder that the items share, removed at the end."""
    deadline: float
    """When the time is up, by the monotonic clock."""
    env: dict[str, str]
    rehearse: bool

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic() - RESERVE_S

    def log(self, name: str) -> Path:
        return self.report.folder / "logs" / f"{name}.log"


def build_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"    {item.name:<14}{item.what} (at most {item.limit_s:.0f} s)" for item in ITEMS)
    parser = argparse.ArgumentParser(
        prog="prove_gpu.sh",
        description=__doc__.format(items=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="the time for everything, installation too (9)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the report's folder (build/prove_gpu/DATE-TIME)")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="run these items only")
    parser.add_argument("--no-install", action="store_true", help="use what is there; items that need more will fail")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny size: no figure means anything")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes <= 1440.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes; give one above 0 and up to 1440")
    return minutes


def main(argv: Sequence[str]) -> int:
    began = time.monotonic()
    parser = build_parser()
    arguments = parser.parse_args(argv)
    known = {item.name: item for item in ITEMS}
    if unknown := [name for name in arguments.only or () if name not in known]:
        parser.error(f"--only {unknown[0]}: no such item; choose from {', '.join(known)}")
    output = arguments.output or ROOT / "build/prove_gpu" / time.strftime("%Y%m%d-%H%M%S")
    if (output / "report.json").exists():
        parser.error(f"--output {output}: holds a report already; choose another folder")
    if not arguments.rehearse and not has_gpu():
        parser.error("this machine has no NVIDIA GPU (nvidia-smi lists none); --rehearse runs on the CPU")
    try:
        (output / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {output}: cannot be written ({error.strerror}); choose another folder")
    items = [known[name] for name in dict.fromkeys(arguments.only)] if arguments.only else ITEMS
    names = {ENVIRONMENT: "a Python with all that is needed"} | {item.name: item.what for item in items}
    report = Report(output.absolute(), names, rehearsal=arguments.rehearse, minutes=arguments.minutes)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    with tempfile.TemporaryDirectory(prefix="prove_gpu-", ignore_cleanup_errors=True) as work:
        env = _environment(arguments.rehearse)
        proof = Proof(report, Path(work), began + 60 * arguments.minutes, env, arguments.rehearse)
        return run(proof, items, install=not arguments.no_install)


def run(proof: Proof, items: Sequence[Item], *, install: bool, python: str | None = None) -> int:
    """Run all items that the time allows, however the proof ends, and return the exit code.

    Args:
        proof: What they have in common.
        items: The items, the most valuable first.
        install: Whether a missing environment may be installed.
        python: The Python program to use; None looks for one.
    """
    report = proof.report
    try:
        report.content["code"], report.content["machine"] = describe_code(), describe_machine()
        report.write()
        if python is None:
            found = prepare(proof, install)
            python = None if found is None else found.path
        if python is None:
            report.close("stopped: there is no environment to run the items in")
        else:
            for item in items:
                prove(proof, item, python)
            report.close("finished")
    except Stopped as stopped:
        report.close(f"stopped by {stopped}")
        message(f"stopped by {stopped}; what was found by then is in {report.folder}/report.md")
        return 128 + signal.Signals[str(stopped)]
    counts = report.results()
    message(f"{', '.join(f'{n} {result}' for result, n in counts.items())}; {report.folder}/report.md")
    return 1 if counts[FAIL] else 0


def prepare(proof: Proof, install: bool) -> Python | None:
    """Find or install the environment of the items, and report it as an item of its own."""
    report = proof.report
    report.begin(ENVIRONMENT)
    seconds = INSTALL_SHARE * proof.left_s
    python, how = find_python(
        proof.env, proof.log(ENVIRONMENT), rehearse=proof.rehearse, install=install, seconds=seconds
    )
    if python is not None:
        report.content["versions"] = {"python": python.version} | python.versions
        if python.cuda is not None:
            report.content["machine"]["torch's GPU"] = ", ".join(f"{k} {v}" for k, v in python.cuda.items())
    whole = python is not None and python.why_not(proof.rehearse) is None
    _print_end(report.end(ENVIRONMENT, PASS if whole else FAIL, how, []))
    return python


def prove(proof: Proof, item: Item, python: str) -> None:
    """Run one item, if there is time for it, and report what became of it."""
    report, left = proof.report, proof.left_s
    if left < item.least_s:
        reason = f"no time: {max(left, 0.0):.0f} s are left, and it needs {item.least_s:.0f} s"
        _print_end(report.end(item.name, SKIPPED, reason, []))
        return
    limit = item.limit_s * (REHEARSAL_PATIENCE if proof.rehearse else 1)
    seconds = min(limit, left)
    findings = proof.work / f"{item.name}.jsonl"
    command = [python, *item.words, "--findings", str(findings), "--work", str(proof.work)]
    command += ["--rehearse"] if proof.rehearse else []
    message(f"{left / 60:4.1f} min left: {item.name}, for at most {seconds:.0f} s")
    report.begin(item.name)
    log = proof.log(item.name)
    log.write_text(f"$ {shlex.join(command)}\n")
    try:
        code = run_bounded(command, log, proof.env, ROOT, seconds)
    except Stopped as stopped:
        report.end(item.name, SKIPPED, f"stopped by {stopped} while it ran", read_findings(findings))
        raise
    found = read_findings(findings)
    _print_end(report.end(item.name, *judge(code, seconds, limit, found, log), found))


def judge(code: int | None, seconds: float, limit: float, findings: list[dict], log: Path) -> tuple[str, str]:
    """Return the result of an item and the reason for it.

    Args:
        code: Its exit code; None if it was killed because its time was up.
        seconds: The time it was given.
        limit: The time it would have been given, had there been more.
        findings: What it said.
        log: What it printed.
    """
    checks = [finding for finding in findings if finding["kind"] == "check"]
    wrong = [f"{check['name']}: {check['detail']}" for check in checks if not check["right"]]
    slow = [f"{finding['name']}: {finding['detail']}" for finding in findings if finding["kind"] == "slow"]
    done = f"{len(checks)} checks were done" if checks else "nothing was checked"
    if wrong:
        return FAIL, f"wrong: {'; '.join(wrong)}"
    if code is None and seconds < limit:
        return SKIPPED, f"no time: the proof's time was up after {seconds:.0f} s of it; {done} by then, none wrong"
    if code is None:
        return FAIL, f"not done in its time limit of {seconds:.0f} s; {done} by then, none wrong"
    if code:
        return FAIL, f"ended with exit code {code}: {_last_line(log)}"
    if not checks:
        return FAIL, "it ended without checking anything"
    if slow:
        return SLOW, "; ".join(slow)
    return PASS, ""


def message(text: str) -> None:
    print(f"prove_gpu: {text}", file=sys.stderr, flush=True)


def _print_end(item: dict) -> None:
    seconds = "" if item["seconds"] is None else f" after {item['seconds']:g} s"
    message(f"{item['name']}: {item['result']}{seconds}{': ' if item['reason'] else ''}{item['reason']}")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:400] if len(lines) > 1 else "it printed nothing"


def _environment(rehearse: bool) -> dict[str, str]:
    """Return the environment of the items: nothing is fetched, nothing is reported elsewhere."""
    path = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # one process, whoever started us
        env.pop(name, None)
    return env | {"CUDA_VISIBLE_DEVICES": ""} if rehearse else env


def _stop(number: int, frame: object) -> None:
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the last words are not to be interrupted
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
