#!/usr/bin/env python
"""Follow a training run on a terminal, from any machine that sees its folder; nothing is written there.

python launch/watch.py runs/quickstart
python launch/watch.py runs/quickstart --once
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, run
from gptoss_dist.tracking.live.command import WatchOptions, watch


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return run(Program("watch.py", prefix="watch.py", failed=2), WatchOptions, watch, argv)


if __name__ == "__main__":
    sys.exit(main())
