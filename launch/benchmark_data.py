#!/usr/bin/env python
"""Runs launch/benchmarks/data.py, under the name that it has had."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("benchmarks") / "data.py"), run_name="__main__")
