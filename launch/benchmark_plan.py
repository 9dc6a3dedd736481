#!/usr/bin/env python
"""Runs launch/benchmarks/plan.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("benchmarks") / "plan.py"), run_name="__main__")
