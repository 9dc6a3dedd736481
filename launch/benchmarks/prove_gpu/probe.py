"""Prints as JSON what a Python program has of what this project needs; run by the very program that is asked about.

    PYTHON launch/benchmarks/prove_gpu/probe.py

What is needed is read from setup.cfg, so that a new dependency is no new line here.
"""

import configparser
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path

NOT_IN_SETUP_CFG = ("triton", "megablocks", "stanford-stk", "pytest")
NICE_TO_HAVE = ("megablocks_ops", "grouped_gemm")


def main() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[3] / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    needed = [re.split(r"[<>=!~\[;]", line)[0].strip() for line in lines if line.strip()]
    versions: dict[str, str] = {}
    missing = []
    for name in (*needed, *NOT_IN_SETUP_CFG):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    found = {"python": sys.version.split()[0], "versions": versions, "missing": missing, "cuda": None}
    for name in NICE_TO_HAVE:
        versions[name] = "there" if importlib.util.find_spec(name) else "not there"
    if "torch" in versions:
        import torch

        versions["torch"] = torch.__version__
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            found["cuda"] = {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "capability": f"{device.major}.{device.minor}",
                "multiprocessors": device.multi_processor_count,
                "count": torch.cuda.device_count(),
                "runtime": torch.version.cuda,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
