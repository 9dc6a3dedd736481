"""Many starts of one run at nearly the same time: one of them trains, the others say who it is.

KILLS=40 pytest tests/stress -k side starts forty.
"""

import os
import random
import time

import pytest

from tests.support.ranks import losses, run, start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

AT_ONCE = 5
ROUNDS = max(1, int(os.environ.get("KILLS", "5")) // AT_ONCE)


def test_many_starts_side_by_side(settings, tmp_path):
    draw = random.Random(0)
    options = ["--config", str(settings), "--train.deterministic", "true", "--resume", "auto"]
    run("launch/train.py", *options, "--run.dir", str(tmp_path / "whole"))
    whole, refused = losses(tmp_path / "whole"), 0
    for number in range(ROUNDS):
        folder, started = tmp_path / str(number), []
        for _ in range(AT_ONCE):
            started.append(start("launch/train.py", *options, "--run.dir", str(folder)))
            time.sleep(draw.random() * draw.choice([0.0, 0.1, 1.0]))
        for done in [each.wait() for each in started]:
            said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
            assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr
            if done.returncode:
                refused += 1
                assert len(said) == 1, said
                assert "is in use by process" in said[0] or "another start has written checkpoints" in said[0]
        assert losses(folder) == whole and len(whole) == 12
        assert not [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith(".superseded")]
    print(f"{ROUNDS * AT_ONCE} starts, {refused} refused")
