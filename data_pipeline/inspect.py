"""The command `python -m data_pipeline.inspect`; see tools/inspect.py."""

import sys

from data_pipeline.tools.inspect import main

if __name__ == "__main__":
    sys.exit(main())
