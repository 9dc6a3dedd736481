"""Connections that break, stores that are busy, and files that change while they are read."""

import http.server
import json
import random
import threading
import time
from types import SimpleNamespace

import pytest

from data_pipeline import open_source
from data_pipeline.stores.attempts import READING
from tests.support.bucket import Fault, proxy, upload
from tests.support.prepared import contents, documents_of, run

pytestmark = pytest.mark.heavy
_PREPARE = ("--tokenizer", "bytes", "--validation-fraction", 0)


def is_object(request):
    return request.method == "GET" and "list-type" not in request.path


def several_faults(request):
    """Many requests fail at first, by a status, before the answer or in the middle of it, and then succeed."""
    faults = [Fault(503, "SlowDown"), Fault(cut_after=700), Fault(500, "InternalError"), Fault(cut_after=0)]
    if request.method == "HEAD":
        return Fault(503) if request.count == 1 else None
    kind = request.start // 97 % 12
    return faults[kind] if request.count == 1 and kind < len(faults) else None


def test_what_breaks_is_read_again(tmp_path, server, connect, small_parts, corpus, objects):
    upload(server, "broken", objects)
    with proxy(server, several_faults) as between:
        connect(between.port)
        assert run("s3://broken", "--output", tmp_path / "remote", *_PREPARE) == 0
    kinds = {(r.method, "list-type" in r.path) for r in between.requests if r.count > 1}
    assert between.faults > 25 and kinds == {("GET", True), ("GET", False), ("HEAD", False)}
    assert run(corpus, "--output", tmp_path / "local", *_PREPARE) == 0
    remote, local = contents(tmp_path / "remote"), contents(tmp_path / "local")
    shards = [name for name in local if name.endswith((".bin", ".idx"))]
    assert len(shards) > 9 and all(remote[name] == local[name] for name in shards)


def test_a_connection_that_always_breaks_makes_progress(server, connect, small_parts, texts):
    """Nothing larger than 2,000 bytes ever arrives; what is asked for becomes smaller."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:100]).encode()
    upload(server, "slow", {"a.jsonl": lines})
    with proxy(server, lambda request: Fault(cut_after=2000) if is_object(request) else None) as between:
        connect(between.port)
        assert list(open_source("s3://slow/a.jsonl").documents()) == texts[:100]


def test_what_the_reader_does_between_two_reads_is_no_time_of_failing(server, connect, small_parts, texts, monkeypatch):
    """A connection that was idle for long is often reset; one failure is no reason to give up."""
    passed = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    monkeypatch.setattr("data_pipeline.stores.attempts.time", clock)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:100]).encode()
    upload(server, "idle", {"a.jsonl": lines})
    with proxy(server) as between:
        connect(between.port)
        documents = open_source("s3://idle/a.jsonl").documents()
        assert next(documents) == texts[0]
        passed[0] = READING.seconds + 1
        between.fault = lambda request: Fault(cut_after=0) if is_object(request) and not between.faults else None
        assert list(documents) == texts[1:100] and between.faults == 1


def test_what_never_stops_failing_is_an_error_and_can_be_continued(
    tmp_path, server, connect, small_parts, corpus, capsys
):
    upload(server, "down", {"a.jsonl": (corpus / "a.jsonl").read_bytes()})
    options = ("--output", tmp_path / "out", *_PREPARE)
    far = (corpus / "a.jsonl").stat().st_size // 2
    with proxy(server) as between:
        connect(between.port)
        between.fault = lambda request: Fault(cut_after=10) if is_object(request) and request.start > far else None
        start = time.monotonic()
        code, _, err = run("s3://down/a.jsonl", *options, capsys=capsys)
        assert code == 2 and time.monotonic() - start < 60
        assert err.count("\n") == 1 and "s3://down/a.jsonl: cannot be read: " in err, err
        assert "check the network" in err and "(8 tries in" in err and "the same command continues" in err
        assert not (tmp_path / "out").exists()
        between.fault = lambda request: None
        code, out, err = run("s3://down/a.jsonl", *options, capsys=capsys)
        assert code == 0 and not err and "continuing: " in out and "0 of" not in out
    assert run(corpus / "a.jsonl", "--output", tmp_path / "local", *_PREPARE) == 0
    assert documents_of(tmp_path / "out", "train") == documents_of(tmp_path / "local", "train")


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.zst", "deep/d.parquet", "deep/er/250 \u00fc.txt"])
@pytest.mark.parametrize("when", ["found", "opened", "while"])
def test_an_object_that_changes_is_noticed(tmp_path, server, connect, small_parts, objects, name, when, capsys):
    other = bytearray(objects[name])
    other[-9] ^= 1  # of the same size
    upload(server, "changing", {name: objects[name]})

    def change(request):
        if is_object(request) and (when == "opened" or request.start > 0):
            between.fault = lambda request: None
            return Fault(before=lambda: upload(server, "changing", {name: bytes(other)}))
        return None

    with proxy(server) as between:
        connect(between.port)
        source = open_source(f"s3://changing/{name}")
        if when == "found":
            upload(server, "changing", {name: bytes(other)})
        else:
            between.fault = change
        if when == "while" and name.endswith(".txt"):
            pytest.skip("it is read by one request")
        with pytest.raises(ValueError, match=r"was changed since it was found; leave inputs as they are") as error:
            for part in source.parts:
                list(part.read())
        assert "\n" not in str(error.value) and name.rpartition("/")[2][:6] in str(error.value)


class _Web(http.server.BaseHTTPRequestHandler):
    """A server of web pages that cuts half of its answers, anywhere."""

    data, answers_ranges, cut, changed = b"", True, True, None

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(self.data, whole=True)

    def do_GET(self):
        data, asked = self.data, self.headers.get("Range")
        if self.answers_ranges and asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            self._answer(data[int(start) : int(stop or len(data)) + 1], start=int(start))
        else:
            self._answer(data)

    def _answer(self, body, start=None, whole=False):
        self.send_response(200 if start is None else 206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(self.data)}"')
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.data)}")
        self.end_headers()
        if not whole:
            cut = self.cut and random.random() < 0.5
            self.wfile.write(body[: random.randrange(len(body))] if cut else body)


@pytest.fixture
def web(connect):
    """A class of handlers, whose attributes a test sets, and the address where they answer."""
    handler = type("Web", (_Web,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("answers_ranges", [True, False])
@pytest.mark.parametrize("name", ["a.jsonl", "d.parquet"])
def test_web_pages_that_break(web, small_parts, objects, texts, name, answers_ranges):
    random.seed(1)
    handler, address = web
    handler.data = next(data for path, data in objects.items() if path.endswith(name))
    handler.answers_ranges = answers_ranges
    handler.cut = name == "a.jsonl"
    source = open_source(f"{address}/{name}")
    assert list(source.documents()) == (texts[:100] if name == "a.jsonl" else texts[150:250])


def test_a_web_page_that_changes_is_noticed(web, small_parts, objects):
    handler, address = web
    handler.data, handler.cut = objects["a.jsonl"], False
    source = open_source(f"{address}/a.jsonl?token=SECRET")
    records = source.parts[0].read()
    next(records)
    handler.data = handler.data.swapcase()
    with pytest.raises(ValueError, match=r"a.jsonl\?token=\*\*\*: was changed since it was found"):
        list(records)
