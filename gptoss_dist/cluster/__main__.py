"""Print the folder of a run and that of its checkpoints, a line each: for job scripts, which know only its arguments.

    python -m gptoss_dist.cluster --config configs/quickstart.yaml --run.name mine

The settings are checked as launch/train.py checks them, and that no other start owns the folder. So what is wrong ends
a job on one node, before its ranks start and before it touches the files by which another job knows its own end.
"""

import sys
from pathlib import Path

from data_pipeline.command_line import MISTAKE, Program
from data_pipeline.command_line.mistakes import in_words, is_explained
from data_pipeline.command_line.process import accept_any_text
from data_pipeline.ownership import owned
from gptoss_dist.config import check_named, parse_arguments


def main(argv: list[str]) -> int:
    """Print both folders; return the exit code."""
    try:
        config, _ = parse_arguments(argv)
        check_named(argv)
        if "\n" in f"{config.folder}{config.checkpoint_folder}":
            raise ValueError(f"run.dir={str(config.folder)!r} has a line break in it; give another")
        _check_owner(config.folder)
    except Exception as error:
        if not is_explained(error):
            raise
        Program("gptoss_dist.cluster", prefix="job").report(in_words(error))
        return MISTAKE
    print(config.folder, config.checkpoint_folder, sep="\n")
    return 0


def _check_owner(folder: Path) -> None:
    """Raise ValueError if a start that lives owns a run's folder."""
    if not folder.is_dir():
        return
    try:
        with owned(folder, lambda text: print(f"job: {text}", file=sys.stderr)):
            pass
    except BlockingIOError as owner:
        raise ValueError(
            f"{folder} is in use by {owner}; wait until it has ended, end it, or choose another --run.name"
        ) from None


if __name__ == "__main__":
    accept_any_text(restart=True)
    sys.exit(main(sys.argv[1:]))
