"""Hosts on one machine: network, UTS and PID namespaces on a switch of their own, and cables that can be cut.

    with Hosts(2, tmp_path) as hosts:
        process = hosts.start("node2", ["hostname"])
        hosts.cut("node2")

    node1 10.77.x.1 --- switch --- 10.77.x.2 node2         nothing of it is in the machine's own network

Names resolve in the hosts' own /etc/hosts. Files are shared, as on a cluster. It needs root, and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.support.ranks import environment


def why_not() -> str | None:
    """Return why there can be no such hosts here, or None if there can."""
    if missing := [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]:
        return f"{missing[0]} is not installed (iproute2, util-linux)"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    try:
        link = subprocess.run(
            ["ip", "-n", probe, "link", "add", "b0", "type", "bridge"], capture_output=True, text=True
        )
        pids = subprocess.run(["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
        return f"no bridge can be made: {link.stderr.strip()}" if link.returncode else pids.stderr.decode() or None
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=True)


class Hosts:
    """Hosts node1, node2, ... as a context manager; what runs in them is killed at its end."""

    def __init__(self, number: int, folder: Path) -> None:
        self.names = [f"node{n}" for n in range(1, number + 1)]
        self._prefix = f"lab-{os.getpid()}"
        self._hosts_file = folder / "hosts"
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # `unshare --kill-child`, which takes its PID namespace with it
            process.wait()
        for name in (*self.names, "switch"):
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)

    def start(self, host: str, command: list[str], output: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a host; its output goes to a file.

        Args:
            host: `node1`, ...
            command: What to run.
            output: The file that gets what it writes, after what is there.
            variables: Variables to add to the environment.
        """
        setup = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{self._namespace(host)}"]
        alone = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        line = [*inside, *alone, "sh", "-c", setup, host, str(self._hosts_file), *command]
        with output.open("a") as file:
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment(**variables))
        self._processes.append(process)
        return process

    def cut(self, host: str) -> None:
        """Pull the cable of a host out of the switch: nothing arrives any more, and nobody is told."""
        self._ip("switch", "link", "set", self._port(host), "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        self._ip("switch", "link", "set", self._port(host), "up")

    def _build(self) -> None:
        network = f"10.77.{os.getpid() % 250}"
        addresses = {host: f"{network}.{n}" for n, host in enumerate(self.names, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in addresses.items())]
        self._hosts_file.write_text("".join(f"{line}\n" for line in lines))
        for name in ("switch", *self.names):
            subprocess.run(["ip", "netns", "add", self._namespace(name)], check=True)
            self._ip(name, "link", "set", "lo", "up")
        self._ip("switch", "link", "add", "bridge", "type", "bridge")
        self._ip("switch", "link", "set", "bridge", "up")
        for host, address in addresses.items():
            port = self._port(host)
            self._ip(
                "switch", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._namespace(host)
            )
            self._ip("switch", "link", "set", port, "master", "bridge", "up")
            self._ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip(host, "link", "set", "eth0", "up")

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _port(self, host: str) -> str:
        return f"to-{host}"

    def _ip(self, name: str, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self._namespace(name), *arguments], check=True)


def descendants(process: int) -> list[int]:
    """Return the ids of all processes below one, as the machine itself numbers them."""
    found, todo = [], [process]
    while todo:
        parent = todo.pop()
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                todo += (children := [int(child) for child in tasks.read_text().split()])
                found += children
    return found


def kill_matching(process: int, word: str) -> list[int]:
    """Kill those below a process that have a word in their command line, and no further ones below them."""
    matching = []
    for child in descendants(process):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if word in words and "torch.distributed.run" not in words:
                matching.append(child)
    for child in matching:
        os.kill(child, signal.SIGKILL)
    return matching


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: It did not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.1)
