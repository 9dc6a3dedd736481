"""A local S3 server in a process of its own, and a server in front of one that fails as networks do."""

import contextlib
import http.client
import http.server
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

KEY, SECRET = "AKIDEXAMPLE", "SECRETwJalrXUtnFEMI"
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run moto's server; give its port on 127.0.0.1."""
    command = [sys.executable, "-c", _SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def environment(port: int) -> dict[str, str]:
    """What a user exports for a store that is not Amazon's."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(port: int, bucket: str, files: dict[str, bytes]) -> None:
    """Put objects into a bucket, which is created if it is not there."""
    # Moto looks at no signature, but wants to see one where an object is there already.
    signed = {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, Signature=x"}
    for path in ("", *(f"/{name}" for name in files)):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{bucket}{quote(path)}", files[path[1:]] if path else None, signed)
        response = connection.getresponse()
        assert response.status in (200, 409), (response.status, response.read())
        connection.close()


@dataclass
class Request:
    """One that a proxy has got."""

    method: str
    path: str
    start: int
    """The first byte that was asked for."""
    count: int
    """How often this request has come, with this one."""


@dataclass
class Fault:
    """What a proxy does in place of answering."""

    status: int = 0
    """Answer with this status and no more; 0 passes on what the server says."""
    code: str = ""
    """S3's word for the status."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    before: Callable[[], None] = lambda: None
    """Called before the request is passed on."""


@dataclass
class Proxy:
    """A server that passes on what comes, but for faults."""

    target: int
    """The port of the server behind it."""
    fault: Callable[[Request], Fault | None]
    """Says for each request what goes wrong."""
    port: int = 0
    requests: list[Request] = field(default_factory=list)
    faults: int = 0


@contextlib.contextmanager
def proxy(target: int, fault: Callable[[Request], Fault | None] = lambda request: None) -> Iterator[Proxy]:
    """Run a proxy in threads of this process."""
    made = Proxy(target, fault)
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            with lock:
                asked = self.command, self.path, int(first or 0)
                request = Request(*asked, 1 + sum((r.method, r.path, r.start) == asked for r in made.requests))
                made.requests.append(request)
                found = made.fault(request)
                made.faults += found is not None
            found = found or Fault()
            found.before()
            if found.status:
                self.answer(found.status, {"Content-Type": "application/xml"}, _error(found))
                return
            connection = http.client.HTTPConnection("127.0.0.1", made.target)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body=body or None, headers=headers)
            response = connection.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read(), found.cut_after)
            connection.close()

        def answer(self, status, headers, body, cut_after=None):
            self.send_response_only(status)
            length = headers.pop("Content-Length", None) if self.command == "HEAD" else None
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body if cut_after is None else body[:cut_after])
            if cut_after is not None:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = handle_any

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        made.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield made
        finally:
            server.shutdown()


def _error(fault: Fault) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>".encode()
