"""The command `python -m data_pipeline.merge`; see tools/merge.py."""

import sys

from data_pipeline.tools.merge import main

if __name__ == "__main__":
    sys.exit(main())
