"""The database file: made whole or not at all, recognised when it is half made, opened wherever it lies."""

import contextlib
import logging
import os
import shutil
import sqlite3
import threading

import pytest

from gptoss_dist.tracking.delivery.database import Database, DatabaseUnusable
from tests.support.tracked import history, runs_of, start


@pytest.fixture
def quick_making(empty_store, monkeypatch):
    """The migrations take seconds; here they copy what they once made, in two halves."""
    from mlflow.store.tracking import sqlalchemy_store

    class Engine:
        def dispose(self):
            pass

    class Store:
        fails_after = None

        def __init__(self, uri, artifacts):
            data, path = empty_store.read_bytes(), uri.removeprefix("sqlite:///")
            with open(path, "wb") as file:
                file.write(data[:10_000])
                if self.fails_after:
                    raise self.fails_after
                file.write(data[10_000:])
            self.engine = Engine()

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Store)
    return Store


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_making_leaves_nothing_and_the_next_one_succeeds(tmp_path, quick_making, interruption):
    database = Database(tmp_path / "mlflow.db")
    quick_making.fails_after = interruption
    with pytest.raises(type(interruption)):
        database.prepare(pytest.fail)
    assert names(tmp_path) == ["mlflow.db.lock"]
    quick_making.fails_after = None
    database.prepare(pytest.fail)
    assert names(tmp_path) == ["mlflow.db", "mlflow.db.lock"]
    database.prepare(pytest.fail)


def test_an_empty_file_is_made(tmp_path, quick_making, empty_store):
    (tmp_path / "mlflow.db").touch()
    Database(tmp_path / "mlflow.db").prepare(pytest.fail)
    assert (tmp_path / "mlflow.db").read_bytes() == empty_store.read_bytes()


def test_a_run_that_ends_before_the_making_leaves_nothing_half_and_names_the_command(
    tmp_path, quick_making, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    begun, goes_on = threading.Event(), threading.Event()

    class Slow(quick_making):
        def __init__(self, uri, artifacts):
            super().__init__(uri, artifacts)
            begun.set()
            goes_on.wait(60)

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", Slow)
    said = []
    tracker = start("run", message=said.append)
    tracker.log(1, {"loss/train": 1.0})
    assert begun.wait(60)
    tracker.close(timeout=0)
    assert names(tmp_path) == ["mlflow.db.lock", "run"]
    assert said and "nothing is lost" in said[0] and "python -m gptoss_dist.tracking sync run" in said[0]
    goes_on.set()  # a process would be gone by now
    tracker._thread.join(60)
    assert names(tmp_path) == ["mlflow.db.lock", "run"] and len(said) == 1


def half_made(path, empty_store, version, *, run=False):
    """A database as the first migrations leave it, or an older version of MLflow."""
    shutil.copy(empty_store, path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM alembic_version")
        connection.execute("DROP TABLE workspaces")
        if version:
            connection.execute("INSERT INTO alembic_version VALUES (?)", (version,))
        if run:
            connection.execute("INSERT INTO runs (run_uuid, name, status) VALUES ('a', 'precious', 'FINISHED')")


@pytest.mark.parametrize("version", [None, "97727af70f4d"])
def test_a_half_made_file_is_set_aside_and_made_anew(tmp_path, quick_making, empty_store, version):
    for attempt in ("mlflow.db.half-made", "mlflow.db.half-made.2"):
        half_made(tmp_path / "mlflow.db", empty_store, version)
        before, said = (tmp_path / "mlflow.db").read_bytes(), []
        Database(tmp_path / "mlflow.db").prepare(said.append)
        assert len(said) == 1 and attempt in said[0] and str(tmp_path / "mlflow.db") in said[0]
        assert (tmp_path / attempt).read_bytes() == before, "nothing is deleted"
        assert (tmp_path / "mlflow.db").read_bytes() == empty_store.read_bytes()


def test_a_file_with_runs_in_it_stays_and_the_remedy_is_named(tmp_path, empty_store):
    path = tmp_path / "mlflow.db"
    half_made(path, empty_store, "97727af70f4d", run=True)
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match=r"another version of MLflow.*mlflow db upgrade 'sqlite:///"):
        Database(path).prepare(pytest.fail)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file_stays_and_the_remedy_is_named(tmp_path, content):
    path = tmp_path / "mlflow.db"
    path.write_bytes(content)
    with pytest.raises(DatabaseUnusable, match=r"mlflow\.db is damaged .*move it away"):
        Database(path).prepare(pytest.fail)
    assert path.read_bytes() == content


def test_what_is_no_file_stays_in_its_place_and_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, what in (("folder", "a folder"), ("pipe", "no regular file"), ("device", "no regular file")):
        with pytest.raises(DatabaseUnusable, match=f"{name} is {what}.*rename it"):
            Database(tmp_path / name).prepare(pytest.fail)
        assert not (tmp_path / name).is_file()


def test_a_link_to_another_disk_is_followed_when_the_database_is_made(tmp_path, quick_making, empty_store):
    (tmp_path / "disk").mkdir()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "disk" / "big.db")
    Database(tmp_path / "mlflow.db").prepare(pytest.fail)
    assert (tmp_path / "mlflow.db").is_symlink() and names(tmp_path / "disk") == ["big.db"]
    assert (tmp_path / "disk" / "big.db").read_bytes() == empty_store.read_bytes()


def test_the_user_is_told_in_the_terminal_and_can_send_the_rest(tmp_path, store):
    (tmp_path / "mlflow.db").write_bytes(b"damaged" * 1000)
    said = []
    tracker = start(tmp_path / "run", message=said.append)
    tracker.close()
    assert "mlflow.db is damaged" in said[0] and "move it away" in said[0]
    assert "mlflow.db is damaged" in said[-1] and f"gptoss_dist.tracking sync {tmp_path / 'run'}" in said[-1]


@pytest.mark.parametrize("name", ["q?mode=memory", "a%20b 50%", "it's: [1]#&;\tö"])
def test_the_database_is_in_the_working_directory_whatever_its_name(tmp_path, store, empty_store, monkeypatch, name):
    from mlflow import MlflowClient

    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(empty_store, folder)
    monkeypatch.chdir(folder)
    before = set(tmp_path.iterdir())
    tracker = start("run")
    tracker.log(1, {"loss/train": 1.0})
    (folder / "note.txt").write_text("hello")
    tracker.artifact("note.txt")
    tracker.close()
    assert set(tmp_path.iterdir()) == before, "nothing is put elsewhere"
    database = Database(folder / "mlflow.db")
    client = MlflowClient(tracking_uri=database.uri)
    (run,) = runs_of(client)
    assert history(client, run.info.run_id, "loss/train") == [(1, 1.0)]
    assert (folder / "mlartifacts" / run.info.run_id / "artifacts" / "note.txt").is_file()
    resumed = start("run", resumed_step=1)
    resumed.close()
    assert resumed.run_id == run.info.run_id


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_checkout_goes_on_in_its_own_database(tmp_path, store, empty_store, monkeypatch, how):
    from mlflow import MlflowClient
    from mlflow.tracking._tracking_service import utils

    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copy(empty_store, old)
    monkeypatch.chdir(old)
    (old / "note.txt").write_text("hello")
    first = start("runs/a")
    first.artifact("note.txt")
    first.close()
    monkeypatch.chdir(tmp_path)
    how(old, new)
    utils._artifact_repos_cache.clear()  # the run goes on in another process
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}

    monkeypatch.chdir(new)
    resumed = start("runs/a", resumed_step=1)
    resumed.artifact("note.txt", "again")
    resumed.close()
    other = start("runs/b")
    other.artifact("note.txt")
    other.close()
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    assert old.exists() == bool(before)
    client = MlflowClient(tracking_uri=f"sqlite:///{new / 'mlflow.db'}")
    assert {run.info.run_id for run in runs_of(client)} == {first.run_id, other.run_id}
    assert resumed.run_id == first.run_id
    assert {item.path for item in client.list_artifacts(first.run_id)} == {"note.txt", "again"}
    assert [item.path for item in client.list_artifacts(other.run_id)] == ["note.txt"]
    assert (new / "mlartifacts" / first.run_id / "artifacts" / "again" / "note.txt").is_file()


def test_a_copy_without_a_database_does_not_write_into_the_original(tmp_path, store, empty_store, monkeypatch):
    old, copies, here = tmp_path / "old", tmp_path / "copies", tmp_path / "here"
    for folder in (old, here):
        folder.mkdir()
        shutil.copy(empty_store, folder)
    monkeypatch.chdir(old)
    first = start("runs/a")
    first.close()
    shutil.copytree(old / "runs", copies / "runs")
    before = (old / "mlflow.db").read_bytes()
    monkeypatch.chdir(here)
    copy = start(copies / "runs" / "a", resumed_step=1)
    copy.close()
    assert (old / "mlflow.db").read_bytes() == before
    assert copy.run_id not in (None, first.run_id)

    # A run that was moved away from its database goes on there: the original is no more.
    shutil.move(old / "runs" / "a", tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    moved = start("a", resumed_step=1)
    moved.close()
    assert moved.run_id == first.run_id


def test_artifacts_in_a_place_of_the_users_stay_there(tmp_path, client, store):
    place = (tmp_path / "elsewhere").as_uri()
    experiment = client.create_experiment("tests", artifact_location=place)
    Database(tmp_path / "mlflow.db").adopt_artifacts(experiment)
    assert client.get_experiment(experiment).artifact_location == place


@pytest.mark.parametrize("options", ["", "?timeout=30"])
def test_a_given_uri_is_taken_as_mlflow_takes_it(tmp_path, store, empty_store, monkeypatch, options, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "db").mkdir()
    shutil.copy(empty_store, tmp_path / "db" / "mine.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///db/mine.db{options}")
    tracker = start(tmp_path / "run")
    tracker.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "db" / "mine.db")) as connection:
        assert connection.execute("SELECT run_uuid FROM runs").fetchall() == [(tracker.run_id,)]
    assert not caplog.records
