#!/usr/bin/env python
"""Write the report of a run: one page of HTML with its curves, samples, events and settings, which opens offline.

    python launch/report.py runs/quickstart
    python launch/report.py runs/quickstart --output for-my-colleagues.html

The run may be under way. At its end each run writes its report by itself, unless tracking.report is false.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.command_line import Program, run
from gptoss_dist.tracking.pages.run_page import ReportOptions, report


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    return run(Program("report.py", prefix="report.py", failed=2), ReportOptions, report, argv)


if __name__ == "__main__":
    sys.exit(main())
