"""Where MLflow is, and what its environment variables ask for; mlflow itself is not imported here."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from data_pipeline.secrets import has_hidden, without_secrets
from gptoss_dist.tracking.delivery.cursor import Cursor

# Read by mlflow at import or per request. Its own defaults block for minutes on a dead server (7 retries, 120 s).
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
_SQLITE = "sqlite:///"
_MLFLOW_SAMPLING_S = 10.0
"""MLflow's own default."""


def prepare_environment() -> None:
    """Have MLflow fail fast and stay quiet, unless the user has set otherwise.

    Call before mlflow is imported.
    """
    for key, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        Path.home()
    except RuntimeError:  # a container's user without a name, and no HOME: importing mlflow asks for one
        os.environ["HOME"] = tempfile.gettempdir()


class DeliveryRefused(Exception):
    """MLflow is not as the run needs it; the message says what to do."""


@dataclass(frozen=True)
class Store:
    """Where MLflow keeps runs."""

    uri: str
    """As the user gave it; for a database file `sqlite:///` and its absolute path, whatever characters that has."""
    database: Path | None = None
    """The file of a sqlite URI."""
    options: str = ""
    """What follows `?` in a sqlite URI, with the question mark."""

    @classmethod
    def in_file(cls, database: Path, options: str = "") -> Self:
        """Return the store in a database file."""
        return cls(f"{_SQLITE}{database}", database, options)

    def require_address(self) -> None:
        """Refuse an address that leads nowhere.

        Raises:
            DeliveryRefused: It was recorded without its secrets.
        """
        if has_hidden(self.uri):
            raise DeliveryRefused(
                f"the address of the MLflow server was recorded without its secrets, {self.uri}: give it anew with "
                "--tracking.uri (--uri of other commands), or set MLFLOW_TRACKING_URI"
            )

    def remember(self, cursor: Cursor, run_dir: Path) -> None:
        """Note in the cursor where the run is sent."""
        cursor.uri, cursor.database, cursor.folder = without_secrets(self.uri), None, str(run_dir.absolute())
        if self.database is not None:
            cursor.database = os.path.relpath(self.database, run_dir)


def find_store(uri: str | None, cursor: Cursor, run_dir: Path) -> Store:
    """Return where to send a run: as given, by the environment, as recorded, or a database in this directory.

    A recorded database is looked for beside the run's folder, as it lay when the run began, so that a checkout that was
    moved or copied goes on in its own database. It is looked for where it was only if the run's folder is not there any
    more: a copy must not write into the original's run.
    """
    given = uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if given:
        database = sqlite_path(given)
        question, options = given.partition("?")[1:]
        return Store(given) if database is None else Store.in_file(database, question + options)
    if cursor.database is not None:
        beside = Path(os.path.normpath(run_dir.absolute() / cursor.database))
        if os.path.lexists(beside):
            return Store.in_file(beside)
    if cursor.uri is not None:
        if not cursor.uri.startswith(_SQLITE):
            return Store(cursor.uri)
        before = Path(cursor.uri.removeprefix(_SQLITE))
        original = Path(cursor.folder or run_dir)
        is_copy = original.exists() and not original.samefile(run_dir)  # which may have several names
        if before.is_file() and not is_copy:
            return Store.in_file(before)
    return Store.in_file(Path.cwd() / "mlflow.db")


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite URI's file; None for any other URI and for a database in memory."""
    path = uri.removeprefix(_SQLITE)
    if path == uri:
        return None
    if re.search("[%?]", path):
        # Options and escapes: what they mean differs between versions of SQLAlchemy, which opens the file.
        try:
            from sqlalchemy.engine import make_url

            path = make_url(uri).database or ""
        except Exception:  # not installed, or a URI that MLflow will refuse
            return None
    return Path(path).absolute() if path and not path.startswith((":memory:", "file:")) else None


@dataclass(frozen=True)
class Wishes:
    """What MLflow's own variables ask for, as they do in programs that log to MLflow through other libraries."""

    run_id: str | None = None
    """MLFLOW_RUN_ID: the run to continue, whatever made it."""
    experiment: str | None = None
    """MLFLOW_EXPERIMENT_NAME."""
    experiment_id: str | None = None
    """MLFLOW_EXPERIMENT_ID, where no name is given."""
    run_name: str | None = None
    """MLFLOW_RUN_NAME: the run's name in MLflow; its folder is named by `run.name`."""
    tags: dict[str, str] = field(default_factory=dict)
    """MLFLOW_TAGS: a JSON object; and the run that MLflow shows this one below, if MLFLOW_PARENT_RUN_ID names one."""
    system_metrics_every_s: float | None = None
    """MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING and MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL: seconds between samples, 0 for
    none; None if neither is set."""
    node: str | None = None
    """MLFLOW_SYSTEM_METRICS_NODE_ID: this node's name in the system metrics."""

    @classmethod
    def read(cls, message: Callable[[str], None], *, is_child: bool = False) -> Self:
        """Read the environment; what makes no sense is left out, and the user is told.

        Args:
            message: What tells the user.
            is_child: Whether the run is below another one of ours, which is the one that ids and names mean.
        """
        parent = None if is_child else _variable("MLFLOW_PARENT_RUN_ID")
        return cls(
            run_id=None if is_child else _variable("MLFLOW_RUN_ID"),
            experiment=(experiment := _variable("MLFLOW_EXPERIMENT_NAME")),
            experiment_id=_variable("MLFLOW_EXPERIMENT_ID") if experiment is None else None,
            run_name=None if is_child else _variable("MLFLOW_RUN_NAME"),
            tags=({} if parent is None else {"mlflow.parentRunId": parent}) | _tags(message),
            system_metrics_every_s=_system_metrics_every_s(message),
            node=_variable("MLFLOW_SYSTEM_METRICS_NODE_ID"),
        )


def user_tags() -> dict[str, str]:
    """Return MLflow's own tags for who runs what, by which its pages name a run's user and source."""
    user = _variable("MLFLOW_TRACKING_USERNAME")
    if user is None:
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # a container's user without a name
            user = "unknown"
    return {"mlflow.user": user, "mlflow.source.name": sys.argv[0] or "<console>", "mlflow.source.type": "LOCAL"}


def _variable(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _tags(message: Callable[[str], None]) -> dict[str, str]:
    text = _variable("MLFLOW_TAGS")
    if text is None:
        return {}
    try:
        tags = json.loads(text)
        if not isinstance(tags, dict):
            raise ValueError(text)
    except (ValueError, RecursionError):
        message(f'MLFLOW_TAGS={text[:200]!r} is not a JSON object, such as \'{{"team": "nlp"}}\': no tags are taken')
        return {}
    return {key: str(value) for key, value in tags.items()}


def _system_metrics_every_s(message: Callable[[str], None]) -> float | None:
    enabled = _flag("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", message)
    name, every_s = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", None
    if (text := _variable(name)) is not None:
        try:
            every_s = float(text)
            if not 0 < every_s < math.inf:
                raise ValueError(text)
        except ValueError:
            message(f"{name}={text[:200]!r} is no number of seconds above 0: it is not used")
            every_s = None
    if enabled is None:
        return every_s
    return (every_s or _MLFLOW_SAMPLING_S) if enabled else 0.0


def _flag(name: str, message: Callable[[str], None]) -> bool | None:
    value = (_variable(name) or "").lower()
    if value not in ("", "true", "1", "false", "0"):
        message(f"{name}={value[:200]!r} is neither true nor false: it is not used")
        return None
    return value in ("true", "1") if value else None
