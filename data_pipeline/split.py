"""The command `python -m data_pipeline.split`; see tools/split.py."""

import sys

from data_pipeline.tools.split import main

if __name__ == "__main__":
    sys.exit(main())
