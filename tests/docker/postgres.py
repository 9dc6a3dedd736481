"""A Postgres of Debian's packages in a temporary folder, on a free port, with a password."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.fork_server import free_port

PASSWORD = "p@ss:w/rd$"
"""A URI would need it quoted."""


def programs() -> Path | None:
    """Return the folder of initdb and pg_ctl, or None; Debian keeps them off the path."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextmanager
def running() -> Iterator[int]:
    """Run a server with an empty database `mlflow` of a user `mlflow`; give its port on 127.0.0.1, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not in pytest's, which are closed to other users
    secret = folder / "password"
    secret.write_text(PASSWORD)
    run = {"check": True, "cwd": "/", "stdout": subprocess.DEVNULL, "timeout": 120}
    if os.geteuid() == 0:  # as whom Postgres refuses to run
        user = pwd.getpwnam("postgres")
        run |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        for path in (folder, secret):
            os.chown(path, user.pw_uid, user.pw_gid)
    bin_, port = programs(), free_port()
    initdb = [bin_ / "initdb", "-D", folder / "data", "-U", "mlflow", f"--pwfile={secret}", "--auth=scram-sha-256"]
    pg_ctl = [bin_ / "pg_ctl", "-D", folder / "data", "-w"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    try:
        subprocess.run([*initdb, "--no-sync"], **run)
        subprocess.run([*pg_ctl, "-l", folder / "log.txt", "-o", options, "start"], **run)
        try:
            createdb = [bin_ / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
            subprocess.run(createdb, **run, env=os.environ | {"PGPASSWORD": PASSWORD})
            yield port
        finally:
            subprocess.run([*pg_ctl, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder)
