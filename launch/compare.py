#!/usr/bin/env python
"""Compare runs: what differs, losses at equal tokens, FLOPs and hours, and which differences are more than noise.

Folders:     python launch/compare.py runs/lr1e-3 runs/lr2e-3 --at-tokens 300k
MLflow:      python launch/compare.py --experiment sweep --filter "params.optim.lr = '0.001'"
Larger runs: python launch/compare.py runs/sweep-1 runs/sweep-2 runs/sweep-3 runs/sweep-4 runs/sweep-5 --predict 1e3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, run
from gptoss_dist.tracking.comparing.command import CompareOptions, compare


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return run(Program("compare.py", prefix="compare.py", failed=2), CompareOptions, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
