"""The command `python -m data_pipeline.vocabulary`; see tokenizer/rank_files.py."""

import sys

from data_pipeline.tokenizer.rank_files import main

if __name__ == "__main__":
    sys.exit(main())
