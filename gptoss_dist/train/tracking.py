"""`python -m gptoss_dist.train.tracking`, the former name of `python -m gptoss_dist.tracking`."""

import sys

from gptoss_dist.tracking.tracker import main

if __name__ == "__main__":
    sys.exit(main())
