"""The commands of docs/passkey.md: a model learns to retrieve at its training length, and YaRN carries that further."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, environment


def commands() -> list[list[str]]:
    """The words of each command of the page's section about the proof."""
    section = (ROOT / "docs/passkey.md").read_text().partition("## A trained proof")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_tiny_model_learns_to_retrieve_within_minutes(tmp_path):
    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for python, *words in commands():
        assert python == "python"
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=3600
        )
        assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / "runs/passkey_tiny/evaluations").glob("passkey-*/result.json")
    accuracy = {(row["yarn"], row["tokens"]): row["accuracy"] for row in json.loads(result.read_text())["rows"]}
    assert accuracy["none", 256] >= 0.95, accuracy
    assert accuracy["auto", 256] == accuracy["none", 256], accuracy  # at its own length there is nothing to scale
    for length in (1024, 2048):
        assert accuracy["auto:4", length] > accuracy["none", length] + 0.3, accuracy
