"""What a report says of the machine and of the code. Standard library only."""

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path

from launch.benchmarks.prove_gpu.findings import ROOT


def describe_machine() -> dict[str, str]:
    """Return the machine's processor, memory, system and GPU driver, in words."""
    cpu = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    gpu = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {cpu[1] if cpu else platform.machine()}",
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "system": platform.platform(),
        "gpu and driver": "; ".join(gpu.splitlines()) or "nvidia-smi lists none",
    }


def has_gpu() -> bool:
    """Return whether the driver lists a GPU; whether torch can use it is another question."""
    return "GPU" in _output("nvidia-smi", "-L")


def describe_code() -> dict[str, str]:
    """Return the commit, and a digest of the Python code that tells copies apart where there is no commit."""
    digest = hashlib.sha256()
    for folder in ("data_pipeline", "gptoss_dist", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return {"commit": commit or "unknown: no git repository", "digest of the code": digest.hexdigest()[:16]}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
