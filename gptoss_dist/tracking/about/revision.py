"""Which commit of this code runs."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from data_pipeline.secrets import without_secrets


@functools.cache
def git_revision() -> str:
    """Return the commit of this code, with `-dirty` if files differ from it, or `unknown`.

    An image has no repository, but a file that was written when it was built (docker/). It lies beside the code: code
    that is mounted into the image is not taken for the image's.
    """
    return _git("describe", "--always", "--dirty", "--abbrev=12") or _built_from() or "unknown"


def source_tags() -> dict[str, str]:
    """Return MLflow's own tags for the commit, the branch and the remote of this code."""
    found = {
        "commit": _git("rev-parse", "HEAD"),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "repoURL": without_secrets(_git("config", "--get", "remote.origin.url")),
    }
    return {f"mlflow.source.git.{name}": value for name, value in found.items() if value}


def _built_from() -> str:
    try:
        return (Path(__file__).parents[3] / "revision.txt").read_text(errors="replace").strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    """Return what git says of this code; nothing if there is no git, or no repository."""
    try:
        run = subprocess.run(
            ["git", "-C", Path(__file__).parent, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()
