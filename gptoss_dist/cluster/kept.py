"""What is kept of a submission, in a folder of its own inside of the run's: enough to know later what ran.

runs/NAME/job/1/
job.sbatch           the script
config.yaml          the resolved settings; of an array 0.yaml, 1.yaml, ...
revision.txt         the commit, and files that are in neither the commit nor the patch
uncommitted.patch    what differed from the commit, if anything did
1234.log             the output of job 1234
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.disk import write_file_atomically
from gptoss_dist.config import Config

MOST_BYTES_OF_A_FILE = 2**20
"""A file that git does not know goes into the patch up to this size; larger ones are data, and are only named."""


@dataclass(frozen=True)
class Revision:
    """Which code it is."""

    commit: str
    """The commit's id; `unknown` outside of a repository."""
    patch: bytes = b""
    """What differs from it, as `git apply` takes it."""
    left_out: tuple[str, ...] = ()
    """Files that git does not know and that are too large for the patch."""

    def __str__(self) -> str:
        """Return the commit, and whether something differs from it."""
        return self.commit[:12] + (" and uncommitted changes" if self.patch or self.left_out else "")


def read_revision(root: Path) -> Revision:
    """Return which code lies in a folder; without git, or outside of a repository, it is unknown."""
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        unknown = [
            n for n in os.fsdecode(_git(root, "ls-files", "-z", "--others", "--exclude-standard")).split("\0") if n
        ]
        sizes = {name: (root / name).stat().st_size for name in unknown if (root / name).is_file()}
        small = [name for name, size in sizes.items() if size <= MOST_BYTES_OF_A_FILE]
        with tempfile.TemporaryDirectory() as folder:
            # An index of its own, in which the new files stand too: the user's stays as it is.
            index = Path(folder) / "index"
            shutil.copyfile(
                os.fsdecode(_git(root, "rev-parse", "--path-format=absolute", "--git-path", "index")).strip(), index
            )
            if small:
                _git(root, "add", "--intent-to-add", "--", *small, GIT_INDEX_FILE=str(index))
            patch = _git(root, "diff", "--binary", "HEAD", GIT_INDEX_FILE=str(index))
    except (OSError, subprocess.SubprocessError):
        return Revision("unknown")
    return Revision(commit, patch, tuple(sorted(set(sizes) - set(small))))


def _git(root: Path, *arguments: str, **variables: str) -> bytes:
    environment = {**os.environ, **variables}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60).stdout


def next_folder(run: Path) -> Path:
    """Return the folder for the next submission of a run; the earlier ones are numbered from 1 on."""
    numbers = [int(path.name) for path in (run / "job").glob("*") if path.name.isdecimal()]
    return run / "job" / str(max(numbers, default=0) + 1)


def check_submittable(config: Config) -> None:
    """Refuse a run of which its job would find out later that it cannot begin.

    Raises:
        ValueError: There are checkpoints that it does not resume, or its settings have secrets, which are not written.
    """
    if config.resume is None and list(config.checkpoint_folder.glob("step_*[0-9]")):
        raise ValueError(
            f"{config.checkpoint_folder} holds checkpoints already; continue with --resume auto, or choose another "
            "--run.name"
        )
    if config.to_dict()["tracking"]["uri"] != config.tracking.uri:
        raise ValueError(
            "tracking.uri has a password or token in it, which is not written to a job's settings; set "
            "MLFLOW_TRACKING_URI, which the job inherits, instead"
        )


def keep(folder: Path, script: str, configs: dict[str, Config], revision: Revision) -> Path:
    """Write a submission's files, and return the path of its script.

    Args:
        folder: That of `next_folder`.
        script: The script.
        configs: The settings of each run, by the name of their file.
        revision: That of the code.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True)
    for name, config in configs.items():
        config.save(folder / name)
    lines = [revision.commit, *(f"left out: {name}" for name in revision.left_out)]
    write_file_atomically(folder / "revision.txt", ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    if revision.patch:
        write_file_atomically(folder / "uncommitted.patch", revision.patch)
    write_file_atomically(folder / "job.sbatch", script.encode())
    return folder / "job.sbatch"
