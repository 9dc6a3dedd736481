"""What is prepared from a bucket is what is prepared from the same files on this machine."""

import json
import os
import subprocess
import sys

import pytest

from data_pipeline import open_source
from tests.support.bucket import KEY, SECRET, upload
from tests.support.prepared import contents, run

pytestmark = pytest.mark.heavy
_PREPARE = ("--tokenizer", "bytes", "--validation-fraction", 0.1, "--shard-tokens", 9000)


def without_names(directory):
    """The files of a prepared directory, without where the texts came from."""
    files = contents(directory)
    files["prepare.json"] = {**json.loads(files["prepare.json"]), "sources": None}
    files["manifest.json"] = {**json.loads(files["manifest.json"]), "sources": None}
    return files


def test_a_bucket_gives_the_bytes_of_a_folder(tmp_path, server, connect, small_parts, corpus, objects, capsys):
    upload(server, "whole", {f"data set/{name}": data for name, data in objects.items()})
    connect(server)
    patterns = ("", "/*.jsonl", "/*.zst", "/deep/*", "/deep/**/*.txt", "/**/?.json*", "/[a-b].*", "/deep/d.parquet")
    parts = {}
    for pattern in patterns:
        local, remote = open_source(f"{corpus}{pattern}"), open_source(f"s3://whole/data set{pattern}")
        parts[pattern] = [part.name for part in remote.parts]
        assert parts[pattern] == [part.name for part in local.parts], pattern
        assert list(remote.documents()) == list(local.documents())
        if not pattern:
            assert sorted(remote.left_out.split(", ")) == sorted(local.left_out.split(", ")) and remote.left_out
    assert len([name for name in parts[""] if "a.jsonl, bytes" in name]) > 3
    assert len([name for name in parts[""] if "row groups" in name]) > 3

    local, remote = ([f"{base}/a.jsonl", f"{base}/deep", f"{base}/*"] for base in (corpus, "s3://whole/data set"))
    assert run(*local, "--output", tmp_path / "local", *_PREPARE) == 0
    capsys.readouterr()
    code, out, err = run(*remote, "--output", tmp_path / "remote", "--workers", 2, *_PREPARE, capsys=capsys)
    assert code == 0 and not err and "left out: 1 cards (README" in out
    assert without_names(tmp_path / "remote") == without_names(tmp_path / "local")
    assert "already prepared" in run(*remote, "--output", tmp_path / "remote", *_PREPARE, capsys=capsys)[1]


def test_a_key_may_have_any_letters(server, connect):
    """`#` and `?` begin no query, `[` no pattern where it is an object's; fsspec cannot open a name with `::`."""
    names = ("C# notes.jsonl", "what?.jsonl", "q.jsonl#notes.txt", "data[v1]/b.jsonl", "x::y.jsonl")
    upload(server, "odd", {f"all/{name}": json.dumps({"text": name}).encode() for name in names})
    connect(server)
    whole = open_source("s3://odd/all")
    documents = sorted(whole.documents())
    assert documents == sorted(['{"text": "q.jsonl#notes.txt"}', "C# notes.jsonl", "what?.jsonl", "data[v1]/b.jsonl"])
    assert whole.left_out.startswith("1 with `::` in their names")
    for spec in ("all/data[v1]", "all/data[v1]/b.jsonl"):
        assert list(open_source(f"s3://odd/{spec}").documents()) == ["data[v1]/b.jsonl"]
    assert list(open_source("s3://odd/all/C# notes.jsonl").documents()) == ["C# notes.jsonl"]


def test_a_version_is_the_content_not_the_time(server, connect):
    upload(server, "versions", {"a.jsonl": b'{"text": "x"}\n'})
    connect(server)
    before = open_source("s3://versions/a.jsonl").fingerprint
    upload(server, "versions", {"a.jsonl": b'{"text": "x"}\n'})
    assert open_source("s3://versions/*").fingerprint == open_source("s3://versions/a.jsonl").fingerprint == before
    upload(server, "versions", {"a.jsonl": b'{"text": "y"}\n'})
    assert open_source("s3://versions/a.jsonl").fingerprint != before


def test_where_credentials_may_be(tmp_path, server):
    """As AWS's tools read them, and as fsspec does; moto asks for some."""
    upload(server, "private", {"a.jsonl": b'{"text": "x"}\n'})
    address = f"http://127.0.0.1:{server}"
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {address}\n")
    (tmp_path / ".aws/credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    files = {"HOME": str(tmp_path), "AWS_PROFILE": "lab"}
    fsspec = {"FSSPEC_S3_ENDPOINT_URL": address, "FSSPEC_S3_KEY": KEY, "FSSPEC_S3_SECRET": SECRET}
    anonymous = {"AWS_ENDPOINT_URL": address, "FSSPEC_S3_ANON": "true"}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    for number, (given, code) in enumerate([(files, 0), (fsspec, 0), (anonymous, 2)]):
        command = [sys.executable, "-m", "data_pipeline.prepare", "s3://private/a.jsonl", "--tokenizer", "bytes"]
        command += ["--validation-fraction", "0", "--output", str(tmp_path / str(number))]
        done = subprocess.run(command, env={**others, **given}, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert "PermissionError: Forbidden; check that these credentials" in done.stderr or not code
