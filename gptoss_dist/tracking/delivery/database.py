"""The database file in which MLflow keeps runs where there is no server: made whole, recognised when it is not.

MLflow creates its tables in dozens of migrations, which take seconds. A file in which they were interrupted can neither
be used nor finished. So they run in a file of a folder beside, which is then renamed: an interrupted making leaves
nothing but that folder, and the next making removes it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from data_pipeline.disk import link, locked, move, staging_directory, sync_path

_ARTIFACTS = "mlartifacts"
_WAIT_S = 60.0
"""For another process that makes the database, and for one that writes into it."""
# Rows that a database has before anything was logged: the version, the default experiment, the default workspace.
_EMPTY = {"alembic_version": 1, "experiments": 1, "workspaces": 1}


class DatabaseUnusable(Exception):
    """The file is not a database that MLflow can use; the message says what to do."""


class Database:
    """MLflow's database in a file.

    Args:
        path: The file. Its folder must exist, the file need not.
        options: Options of the URI that MLflow is given, with their question mark.
    """

    def __init__(self, path: Path, options: str = "") -> None:
        self.path = path
        self._options = options
        self._alias: tempfile.TemporaryDirectory | None = None
        self._staging: Path | None = None  # while the database is made

    @property
    def uri(self) -> str:
        """The URI to give to MLflow."""
        if self._alias is None and not _is_plain(self.path):
            self._alias = _alias(self.path)
        path = self.path if self._alias is None else Path(self._alias.name) / "mlflow.db"
        return f"sqlite:///{path}{self._options}"

    @property
    def artifacts(self) -> str:
        """The URI of the folder beside the file in which artifacts are kept.

        MLflow would take a folder in the working directory of whatever process comes first.
        """
        return (self.path.parent / _ARTIFACTS).as_uri()

    def prepare(self, message: Callable[[str], None]) -> None:
        """Make the database if there is none; one whose making was interrupted is set aside first.

        Raises:
            DatabaseUnusable: The file is damaged, or of another version of MLflow.
            OSError: It cannot be made.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        lock.touch()
        with locked(lock, _WAIT_S, optional=True):
            if self.path.exists() and not self.path.is_file():
                what = "a folder" if self.path.is_dir() else "no regular file"
                raise DatabaseUnusable(f"{self.path} is {what}, where MLflow's database belongs; rename it")
            if _size(self.path) and not self._is_whole():
                aside = _free_name(self.path.with_name(f"{self.path.name}.half-made"))
                move(self.path, aside)
                message(f"the making of {self.path} was once interrupted; it held no run, and is now {aside.name}")
            if not _size(self.path):
                self._make()

    def adopt_artifacts(self, experiment_id: str, run_id: str | None = None) -> None:
        """Have an experiment's artifacts beside the database, where they are after its folder was moved or copied.

        MLflow keeps absolute paths, and a copy would write into the folder that it was copied from. Places other than
        those that this class gave stay.

        Args:
            experiment_id: The experiment.
            run_id: A run of it that goes on, whose next artifacts belong beside too.
        """
        with contextlib.closing(self._connect()) as connection, connection:
            query = "SELECT artifact_location FROM experiments WHERE experiment_id = ?"
            found = connection.execute(query, (int(experiment_id),)).fetchone()
            before = (found[0] or "") if found else ""
            ours = re.fullmatch(rf"file:.*/{_ARTIFACTS}(/0)?", before)  # /0 is the default experiment's
            here = self.artifacts + (ours[1] or "" if ours else "")
            if not ours or before == here:
                return
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (here, int(experiment_id))
            )
            query = "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?"
            for run, uri in connection.execute(query, (int(experiment_id),)).fetchall():
                if not (uri or "").startswith(f"{before}/"):
                    continue
                new = here + uri.removeprefix(before)
                if run == run_id or _folder(new).exists() or not _folder(uri).exists():
                    connection.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (new, run))

    def has_run(self, run_id: str) -> bool:
        """Return whether the database holds a run; one that is missing or cannot be read holds none."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect()) as connection:
            found = connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
            return found is not None
        return False

    def _make(self) -> None:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        target = self.path.resolve()  # a link may lead to a larger disk
        with staging_directory(target) as staging:
            self._staging = staging
            new = Database(staging / "mlflow.db")
            SqlAlchemyStore(new.uri, self.artifacts).engine.dispose()
            sync_path(new.path)
            if target.exists():  # an empty file
                move(new.path, target)
            else:
                _give_name(new.path, target)
            sync_path(target.parent)
        self._staging = None

    def undo(self) -> None:
        """Remove what an unfinished making has written, for a process that is about to end in the midst of it."""
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _is_whole(self) -> bool:
        """Return False if its making was interrupted.

        Raises:
            DatabaseUnusable: It cannot be used, but there is something in it.
        """
        try:
            with contextlib.closing(self._connect()) as connection:
                version, rows = _version(connection), _rows(connection)
        except sqlite3.OperationalError as error:  # locked for long, or not readable
            raise DatabaseUnusable(f"{self.path} cannot be opened ({error})") from None
        except sqlite3.DatabaseError as error:
            raise DatabaseUnusable(
                f"{self.path} is damaged ({error}): move it away, and a new one is made; or restore it from a backup"
            ) from None
        if version == _newest_version():
            return True
        if all(count <= _EMPTY.get(table, 0) for table, count in rows.items()):
            return False
        raise DatabaseUnusable(
            f"{self.path} was made by another version of MLflow: take a copy and run "
            f"`mlflow db upgrade 'sqlite:///{self.path}'`, or move it away, and a new one is made"
        )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(self.path))}?mode=rw", uri=True, timeout=_WAIT_S / 3)


def _newest_version() -> str | None:
    """Return the version of the tables that the installed MLflow makes and uses."""
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations")).get_current_head()


def _version(connection: sqlite3.Connection) -> str | None:
    if "alembic_version" not in _tables(connection):
        return None
    versions = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    return versions[0][0] if len(versions) == 1 else None


def _rows(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many rows each table has, two standing for all that are more."""
    return {
        table: len(connection.execute(f'SELECT 1 FROM "{table}" LIMIT 2').fetchall()) for table in _tables(connection)
    }


def _tables(connection: sqlite3.Connection) -> list[str]:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [name for (name,) in names if '"' not in name]


def _give_name(source: Path, target: Path) -> None:
    """Rename a file to where nothing is; what a server has put there in this moment stays."""
    try:
        link(source, target)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        move(source, target)


def _is_plain(path: Path) -> bool:
    """Return whether a path means itself in a URI, whoever takes it apart."""
    return re.fullmatch(r"[\w/ .,+@~=()-]*", str(path)) is not None


def _alias(path: Path) -> tempfile.TemporaryDirectory:
    """Return a folder with a plain path, in which the link `mlflow.db` leads to the database.

    A working directory may have `?` or `%20` in its name, which versions of MLflow and SQLAlchemy take for options or
    escapes, each in its own way.
    """
    folder = tempfile.TemporaryDirectory(prefix="gptoss_dist-mlflow-")
    (Path(folder.name) / "mlflow.db").symlink_to(path)
    return folder


def _folder(uri: str) -> Path:
    """Return the folder of a run's artifacts, which MLflow calls `RUN_ID/artifacts`."""
    return Path(unquote(urlsplit(uri).path)).parent


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _free_name(path: Path) -> Path:
    n, free = 1, path
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}.{n}")
    return free
