"""The command `python -m data_pipeline.verify`; see tools/verify.py."""

import sys

from data_pipeline.tools.verify import main

if __name__ == "__main__":
    sys.exit(main())
