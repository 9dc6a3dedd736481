"""`python -m gptoss_dist.tracking sync runs/NAME` sends what a run recorded to MLflow."""

import sys

from gptoss_dist.tracking.tracker import main

if __name__ == "__main__":
    sys.exit(main())
