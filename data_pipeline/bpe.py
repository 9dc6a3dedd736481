"""The command `python -m data_pipeline.bpe`; see tools/train_bpe.py."""

import sys

from data_pipeline.tools.train_bpe import main

if __name__ == "__main__":
    sys.exit(main())
