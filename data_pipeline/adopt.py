"""The command `python -m data_pipeline.adopt`; see tools/adopt.py."""

import sys

from data_pipeline.tools.adopt import main

if __name__ == "__main__":
    sys.exit(main())
