"""Other people's programs, run in an interpreter that has them.

`CLIENTS_PYTHON` names that interpreter where it is not this one: vLLM, for example, wants its own versions of torch and
transformers. docs/testing.md says how to install the clients.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "clients"


@functools.cache
def interpreter(module: str) -> str:
    """Return an interpreter that has `module`; skip the test if there is none."""
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    for python in filter(None, (os.environ.get("CLIENTS_PYTHON"), sys.executable)):
        if subprocess.run([python, "-c", question]).returncode == 0:
            return python
    pytest.skip(f"{module} is not installed; see docs/testing.md")


def ask(module: str, script: str, *arguments: object, timeout_s: float = 1200) -> dict:
    """Run a script of tests/clients in an interpreter that has `module`; return the JSON of its last line."""
    line = [
        interpreter(module),
        str(SCRIPTS / script),
        *(json.dumps(a) if isinstance(a, list) else str(a) for a in arguments),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])
