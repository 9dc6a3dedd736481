"""The one reader of files from elsewhere: every way in which such a file can be wrong is one line."""

import json
import os
import threading
from dataclasses import dataclass

import msgspec
import pytest

from data_pipeline.foreign import (
    Count,
    check_regular,
    convert,
    file_inside,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
)
from data_pipeline.foreign.parsing import MOST_DEPTH

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 60))
DEEP_BY_ALIAS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested more than 64"),
        ('{"a":' * 100_000, "nested more than 64"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested more than 64"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is there twice"),
        ("9" * 5000, "4300 digits"),
        ("{", "not readable JSON"),
        ("", "not readable JSON"),
    ],
)
def test_json_within_limits(text, words):
    with pytest.raises(ValueError) as error:
        parse_json(text, "some.json")
    assert words in str(error.value) and "some.json" in str(error.value) and "\n" not in str(error.value)
    assert "sys." not in str(error.value)
    assert parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH, "x")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "nested more than 64"),
        ("{a: " * 100_000, "nested more than 64"),
        ("".join(" " * i + "a:\n" for i in range(100)), "nested more than 64"),
        (DEEP_BY_ALIAS, "nested more than 64"),
        (LAUGHS, "more than 1,000,000 values"),
        (MERGES, "more than 1,000,000 values"),
        ("a: &a [*a]", "line 1: alias *a stands inside of its own anchor"),
        ("a: &a {b: [1, {c: *a}]}", "inside of its own anchor"),
        ("a: *b", "undefined alias"),
        ("a: 1\nb:\n  c: 1\n  'c': 2", "line 4: key 'c' is there twice"),
        ("? [a, b]\n: c", "no key"),
        ("a: !!python/object/apply:os.system [echo]", "python/object/apply:os.system' is not known"),
        ("a: !mine x", "tag '!mine' is not known"),
        ("a: !!int x", "number that is none"),
        ("a: 0b_", "number that is none"),
        ("a: 1\n---\nb: 2", "single document"),
        ("a: \x1b[31m", "#x001b"),
        ("a: [1", "not readable YAML"),
    ],
)
def test_yaml_within_limits(text, words):
    with pytest.raises(ValueError) as error:
        parse_yaml(text, "some.yaml")
    assert words in str(error.value) and "some.yaml" in str(error.value) and "\n" not in str(error.value)
    assert "unicode string" not in str(error.value)


def test_yaml_that_people_write():
    text = """
base: &base {lr: 5e-2, steps: 1_000, on: yes}
next: {<<: *base, lr: .5}
day: 2026-11-28
n: [1e3, ~, .inf]
"""
    base = {"lr": 0.05, "steps": 1000, True: True}
    assert parse_yaml(text, "x") == {
        "base": base,
        "next": {**base, "lr": 0.5},
        "day": "2026-11-28",
        "n": [1000.0, None, float("inf")],
    }


@dataclass
class Place:
    path: str | None
    sizes: dict[str, Count]


class Entry(msgspec.Struct):
    step: Count
    place: Place
    loss: float | None = None


@pytest.mark.parametrize(
    "values, words",
    [
        (5, "it must be `object`, not `int`"),
        ({"step": 1}, "place is missing"),
        ({"step": "one", "place": {}}, 'step="one" must be `int`, not `str`'),
        ({"step": True, "place": {}}, "step=true must be `int`, not `bool`"),
        ({"step": -1, "place": {}}, "step=-1 must be `int` >= 0"),
        ({"step": 2**63, "place": {}}, "step=9223372036854775808 must be `int` <= 9223372036854775807"),
        ({"step": 1, "place": {"path": None, "sizes": {"a": 1, "b": "x"}}}, 'place.sizes[b]="x" must be `int`'),
        ({"step": 1, "place": {"path": ["x"], "sizes": {}}}, "place.path=[...] must be `str | null`, not `array`"),
        ({"step": 1, "place": {"path": None, "sizes": {}}, "loss": 1e999}, "loss=inf must be a finite number"),
        ({"step": "\x1b" * 100, "place": {}}, "..."),
    ],
)
def test_types(tmp_path, values, words):
    path = tmp_path / "entry.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        read_json(path, Entry, finite=True, remedy="write it again")
    assert words in str(error.value) and str(path) in str(error.value)
    assert str(error.value).endswith("; write it again") and "\x1b" not in str(error.value)


def test_what_is_right_is_read(tmp_path):
    values = {"step": 3, "place": {"path": "x", "sizes": {"a": 1}}, "loss": 2, "newer": []}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    read = [
        read_json(tmp_path / "a.json", Entry),
        convert(parse_yaml(read_text(tmp_path / "a.yaml"), "a"), Entry, "a"),
        convert(values, Entry, "x"),
    ]
    assert read == [Entry(3, Place("x", {"a": 1}), 2.0)] * 3


def _pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make, words",
    [
        (_pipe, "is a pipe"),
        (os.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: None, "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
)
def test_only_regular_files(tmp_path, make, words):
    path = tmp_path / "some\x1bfile"
    make(path)
    refused = []

    def read():
        for reader, kind in ((read_bytes, ()), (read_text, ()), (read_json, (dict,)), (check_regular, ())):
            with pytest.raises(ValueError) as error:
                reader(path, *kind)
            refused.append(str(error.value))

    thread = threading.Thread(target=read, daemon=True)  # what waits for a pipe would wait for ever
    thread.start()
    thread.join(20)
    assert len(refused) == 4 and all(words in line and "some\\x1bfile" in line for line in refused)


def test_size_and_encoding(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 11)
    assert read_text(path, most=11)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_text(path, most=10)
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="not UTF-8: byte 3 is 0xff; save it as UTF-8"):
        read_text(path)
    with pytest.raises(ValueError, match="null byte"):
        read_text("a\0b")


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "inner/../../secret", "", "a\0b", "out", "folder/secret"])
def test_no_file_outside_of_the_folder(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret").write_text("x")
    (home / "out").symlink_to(tmp_path / "secret")
    (home / "folder").symlink_to(tmp_path)
    (home / "mine").write_text("x")
    (home / "other").symlink_to("mine")
    (tmp_path / "door").symlink_to(home)
    for inside in ("mine", "other"):
        assert file_inside(home, inside) == home / inside
        assert file_inside(tmp_path / "door", inside).read_text() == "x"
    with pytest.raises(ValueError, match=r"no name of a file in this folder|leads out of its folder"):
        file_inside(home, name)


def test_links_of_the_hub_cache(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234" / "original", tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs, tmp_path / "models--a--c" / "blobs"):
        folder.mkdir(parents=True)
    (blobs / "ab12").write_text("x")
    (tmp_path / "models--a--c" / "blobs" / "cd34").write_text("x")
    (snapshot / "config.json").symlink_to("../../../blobs/ab12")
    (snapshot / "stolen.json").symlink_to("../../../../models--a--c/blobs/cd34")
    assert file_inside(snapshot, "config.json").read_text() == "x"
    with pytest.raises(ValueError, match="leads out"):
        file_inside(snapshot, "stolen.json")
