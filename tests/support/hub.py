"""A Hugging Face hub of datasets on this machine, for what `hf://` asks of one: lists of files, and ranges of bytes."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Authorization")))
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._json({"id": found[1], "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            return self._tree(self.server.root / found[1], found[2])
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._file(self.server.root / found[1] / found[2])
        return self._answer(404, b"{}")

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"{}")
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", unquote(urlsplit(self.path).path))
        if not found:
            return self._answer(404, b"{}")
        repo = self.server.root / found[1]
        return self._json([_entry(repo, repo / name) for name in body.get("paths", []) if (repo / name).exists()])

    def _tree(self, repo: Path, folder: str) -> None:
        if not (repo / folder).is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        paths = (repo / folder).rglob("*") if "recursive=true" in self.path.lower() else (repo / folder).iterdir()
        return self._json([_entry(repo, path) for path in sorted(paths)])

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, headers, status = path.read_bytes(), {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT}, 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        return self._answer(status, data, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(repo: Path, path: Path) -> dict:
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}


@contextlib.contextmanager
def running(root: Path, token: str = "") -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve the datasets OWNER/NAME below a folder; with a token only to who has it, as a gated dataset.

    Yields:
        The server: `url` for HF_ENDPOINT, and what was `asked`, as (method, path, authorization).
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.token, server.asked = root, token, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
