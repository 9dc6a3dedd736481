"""A mistake about a store is one line with a remedy, within seconds, and no key is in anything that is left."""

import importlib
import re
import sys
import time

import pytest

from data_pipeline.stores.attempts import LOOKING, repeat
from data_pipeline.stores.errors import StoreError, explained, may_pass
from tests.support.bucket import KEY, SECRET, Fault, proxy, upload
from tests.support.prepared import run

pytestmark = pytest.mark.heavy


def prepare(source, tmp_path, capsys):
    """The one line that it ends with."""
    start = time.monotonic()
    code, out, err = run(source, "--output", tmp_path / "out", "--tokenizer", "bytes", capsys=capsys)
    assert code == 2 and not out and err.count("\n") == 1 and time.monotonic() - start < 20, err
    assert not list(tmp_path.iterdir())
    return err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://nowhere/a.jsonl", "check the name of the bucket"),
        ("s3://nowhere/*.jsonl", "NoSuchBucket: .*check the name of the bucket"),
        ("s3://nowhere", "check the name of the bucket"),
        ("s3://there/none.jsonl", r"FileNotFoundError: there/none\.jsonl; check the name"),
        ("s3://there/a/none", "FileNotFoundError: there/a/none; check the name"),
        ("s3://there/none*.jsonl", "no file is there"),
        ("s3://there/a.csv", "is of no known kind"),
        (
            f"s3://{KEY}:{SECRET}@there/a.jsonl",
            r"'s3://\*\*\*@there/a\.jsonl' .* cannot hold keys; leave them out, and set",
        ),
        (
            f"s3://{KEY}:w/{SECRET}/x+@there/a.jsonl",
            r"'s3://\*\*\*@there/a\.jsonl' .* cannot hold keys; leave them out",
        ),
        (f"s3://{KEY}:/{SECRET}@there/*.jsonl", r"'s3://\*\*\*@there/\*\.jsonl' .* cannot hold keys; leave them out"),
        (f"zip://x::gs://{KEY}:7/{SECRET}@there/a.zip", r"'zip://x::gs://\*\*\*@there/a\.zip' .* cannot hold keys"),
    ],
)
def test_what_is_not_there(tmp_path, server, connect, source, message, capsys):
    upload(server, "there", {"a.csv": b"x", "a/b.jsonl": b"{}\n"})
    connect(server)
    err = prepare(source, tmp_path, capsys)
    assert SECRET not in err and KEY not in err
    assert re.search(message, err), err


@pytest.mark.parametrize("source", ["s3://there/b.jsonl", "s3://there/*.jsonl", "s3://there"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault(403, "AccessDenied"),
            "PermissionError: .*; check that these credentials may list and read there: set AWS_",
        ),
        (Fault(503, "SlowDown"), r"\(5 tries in \d+ s\); the same command continues"),
    ],
)
def test_what_a_store_refuses(tmp_path, server, connect, source, fault, message, capsys):
    upload(server, "there", {"b.jsonl": b"{}\n"})
    with proxy(server, lambda request: fault) as between:
        connect(between.port)
        err = prepare(source, tmp_path, capsys)
    assert re.search(message, err), err
    assert between.faults == (5 if fault.status == 503 else between.faults) <= 5


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, server, connect, capsys):
    """fsspec's glob would take it for an empty one, and half of the corpus would be missing."""
    upload(server, "halves", {"one/a.jsonl": b'{"text": "x"}\n', "two/b.jsonl": b'{"text": "y"}\n'})
    fault = Fault(403, "AccessDenied")
    with proxy(server, lambda request: fault if "prefix=two" in request.path else None) as between:
        connect(between.port)
        assert "PermissionError: AccessDenied" in prepare("s3://halves/**/*.jsonl", tmp_path, capsys)


def test_no_keys_no_endpoint_no_package(tmp_path, server, connect, monkeypatch, capsys):
    connect(1)
    assert "check the network, and AWS_ENDPOINT_URL" in prepare("s3://there/b.jsonl", tmp_path, capsys)
    connect(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "store:9000")
    assert "AWS_ENDPOINT_URL is such as https://" in prepare("s3://there/c.jsonl", tmp_path, capsys)
    connect(server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    err = prepare("s3://there/d.jsonl", tmp_path, capsys)
    assert "NoCredentialsError" in err and "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in err
    connect(server)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3")
    assert "install s3fs (sh launch/install.sh --extras s3)" in prepare("s3://there/e.jsonl", tmp_path, capsys)


def test_keys_are_in_nothing_that_is_left_or_printed(tmp_path, server, connect, monkeypatch, capfd):
    """The keys are in the environment; the records are good, malformed, and cut off by a store that refuses."""
    lines = b'{"text": "good"}\n' * 30 + b'{"text": 3}\n' + b'{"text": "also good"}\n' * 3000
    upload(server, "secrets", {"a.jsonl": lines, "b.jsonl": lines})
    monkeypatch.setattr("data_pipeline.corpora.part.MIN_PART_BYTES", 20_000)
    printed = []
    with proxy(server) as between:
        connect(between.port)
        options = ("--tokenizer", "bytes", "--max-malformed", 0.5)
        assert run("s3://secrets/*.jsonl", "--output", tmp_path / "done", *options) == 0
        between.fault = lambda r: Fault(403, "AccessDenied") if r.path.endswith("b.jsonl") and r.start else None
        assert run("s3://secrets", "--output", tmp_path / "broken", "--workers", 2, *options) == 2
        assert list(tmp_path.glob("broken.preparing/*.json"))
    printed += capfd.readouterr()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"manifest.json", "prepare.json", "malformed.log", "unfinished.txt"} <= {path.name for path in left}
    assert "s3://secrets/b.jsonl: cannot be read: PermissionError" in printed[1]
    for text in [*printed, *(path.read_bytes().decode("latin-1") for path in left)]:
        assert SECRET not in text and KEY not in text and "Signature" not in text


class _Odd(Exception):
    status = 418


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError(), True),
        (EOFError("short"), True),
        (OSError(16, "busy"), True),
        (OSError(22, "invalid"), False),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (ValueError("x"), False),
        (KeyError("a mistake in a library"), False),
        (_Odd(), False),
        (StoreError("said already"), False),
    ],
)
def test_which_errors_may_pass(error, expected, monkeypatch):
    monkeypatch.setattr("data_pipeline.stores.attempts._FIRST_PAUSE", 0.001)
    assert may_pass(error) is expected
    calls = []

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(StoreError) as found:
        repeat("https://u:pw@h/a?sig=SECRET", fail)
    assert len(calls) == (LOOKING.tries if expected else 1)
    assert "\n" not in str(found.value) and ("check the network" in str(found.value)) is expected


def test_an_explanation_has_no_secret():
    text = explained(ValueError("no https://u:SECRET@h/a?sig=SECRET\nmore"), "https://h/a")
    assert text == "ValueError: no https://***@h/a?sig=***"
