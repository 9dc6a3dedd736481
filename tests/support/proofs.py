"""Items of a proof that do what a test needs, in the standard library alone: they start in a moment."""

import os
import time
from pathlib import Path

from launch.benchmarks.prove_gpu.driver import Proof
from launch.benchmarks.prove_gpu.items import Item
from launch.benchmarks.prove_gpu.report import Report

SAY = """
import json, subprocess, sys, time
findings = open(sys.argv[sys.argv.index("--findings") + 1], "a", buffering=1)
def say(kind, **more): findings.write(json.dumps({"kind": kind, "name": "a name", **more}) + "\\n")
def check(right): say("check", right=right, detail="the detail")
"""
HANG = "check(True); child = subprocess.Popen(['sleep', '600']); say('text', text=str(child.pid)); time.sleep(600)"
"""Finds one thing, starts a process whose number is in a text, and waits."""


def fake(name: str, code: str, limit_s: float = 60.0, least_s: float = 0.0) -> Item:
    """Return an item that runs Python code, which may call `check` and `say`."""
    return Item(name, f"what {name} proves", ("-c", SAY + code), limit_s, least_s)


def proof_of(folder: Path, items: list[Item], seconds: float = 120.0) -> Proof:
    """Return a proof with its report in `folder`/report."""
    (folder / "report/logs").mkdir(parents=True)
    (folder / "work").mkdir()
    names = {item.name: item.what for item in items}
    report = Report(folder / "report", names, rehearsal=False, minutes=seconds / 60)
    return Proof(report, folder / "work", time.monotonic() + seconds, dict(os.environ), rehearse=False)
