"""What is taken of a folder or a pattern, each file once, and what is left is counted."""

import json
import os

import pytest

from data_pipeline import open_source
from data_pipeline.corpora.kinds import CARDS, why_left_out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "corpus"
    for name in ("a.txt", "sub/b.md", "README.md", "sub/LICENSE.txt", ".hidden.txt", ".git/x.txt", "sub/.cache/y.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in ("c.pdf", "d.PDF", "noend", "e.parquet.gz", "dataset_info.json"):
        (root / name).write_text("left out")
    (root / "J.JSONL").write_text(json.dumps({"text": "J"}))
    (root / "n.ndjson").write_text(json.dumps({"text": "n"}))
    return root


TEXTS = {"a.txt", "sub/b.md", "J", "n"}


@pytest.mark.parametrize("spec", ["corpus", "corpus/**", "./corpus/", "file://{}"])
def test_cards_and_hidden_files_are_left_out_and_the_rest_is_counted(folder, spec):
    source = open_source(spec.format(folder))
    assert set(source.documents()) == TEXTS and source.description.startswith("4 files at ")
    left = dict(reversed(part.split(" ", 1)) for part in source.left_out.split(", ") if part != "LICENSE and the like)")
    assert left == {".pdf": "2", ".parquet.gz": "1", "without an ending": "1", "hidden": "3", "cards (README": "3"}


def test_what_is_named_is_taken(folder):
    for name in ("README.md", ".hidden.txt", "sub/LICENSE.txt"):
        assert list(open_source(f"corpus/{name}").documents()) == [name]
    assert list(open_source("corpus/.git").documents()) == [".git/x.txt"]


def test_links_are_followed_once(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "o.txt").write_text("other")
    (other / "back").symlink_to(folder)
    (folder / "aa").symlink_to(other)  # sorted before the files that it leads back to
    (folder / "loop").symlink_to(".")
    (folder / "copy.txt").symlink_to("a.txt")
    (folder / "outside.txt").symlink_to(other / "o.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe.txt")
    for spec in ("corpus", "corpus/**", "c*/**"):
        source = open_source(spec)
        documents = list(source.documents())
        assert sorted(documents) == sorted({*TEXTS, "other"}), "each once"
        assert "2 broken links" in source.left_out and "1 no regular files" in source.left_out
        assert "4 links to what is there already" in source.left_out
    assert sorted(open_source("corpus/**/*.txt").documents()) == ["a.txt", "other"]
    assert sorted(open_source("corpus/**/b.md").documents()) == ["sub/b.md"]
    nested = open_source("corpus/**/*/**")
    assert "cannot be read" not in nested.left_out and {"other", "sub/b.md"} <= set(nested.documents())


def test_names_that_are_not_utf8_or_have_brackets_are_as_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"d\xff [1]")
    (tmp_path / odd).mkdir()
    (tmp_path / odd / os.fsdecode(b"\xfe.txt")).write_text("x")
    (tmp_path / odd / "bad.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="rename the folder, or leave out --split"):
        open_source(odd, split="train")
    for spec in (odd, f"{odd}/*", f"{odd}/**", f"{odd}/**/*"):
        source = open_source(spec)
        assert len(source.parts) == 2
        for text in (source.spec, source.description, *(part.name for part in source.parts)):
            text.encode()  # no lone surrogates: it goes into manifests
        assert "d\\udcff [1]" in source.description
        (malformed,) = source.parts[0].read()
        assert str(malformed).encode().startswith(str(tmp_path).encode()) and "line 1: not valid" in str(malformed)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothere/*.txt", "matches nothing, there is no folder 'nothere'"),
        ("corpus/nothere/**/*.txt", "matches nothing, there is no folder 'corpus/nothere'"),
        ("corpus/*.txtt", "no such file, the pattern matches nothing$"),
        ("corpus/*.[pP]*[fF]", r"no file there is taken, what is there is left out \(2 \.pdf\)"),
        ("corpus/c.pdf", "c.pdf is of no known kind; known are .txt, .md, .jsonl"),
        ("corpus/pipe.txt", "is a pipe or a device, no file; write to a file"),
        ("file://{}/pipe.txt", "is a pipe or a device, no file; write to a file"),
        ("/dev/zero", "is a pipe or a device"),
        ("~no-such-user-here/x", "Could not determine home directory"),
        ("a\x1b[31m/b\nc.txt", r"'a\\x1b\[31m/b\\nc.txt': no such file"),
    ],
)
def test_nothing_to_take_is_said_as_it_is(folder, spec, message):
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(ValueError, match=message) as error:
        open_source(spec.format(folder))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_prepared_dataset_in_a_folder_is_no_text(folder):
    (folder / "prepared").mkdir()
    for name in ("tokenizer.gptoss.json", "manifest.json", "notes.txt"):
        (folder / "prepared" / name).write_text("{}")
    source = open_source("corpus")
    assert set(source.documents()) == TEXTS and "1 prepared datasets" in source.left_out
    with pytest.raises(ValueError, match=r"is left out \(2 that describe prepared datasets\)"):
        open_source("corpus/*/*.json")
    assert list(open_source("corpus/pre*/*.txt").documents()) == ["{}"], "an adopted one lies beside its owner's files"


def test_only_prose_is_a_card():
    cards = ("README", "readme.md", "LICENSE", "LICENCE.txt", "README-zh.md", "license.html", "README.md.gz")
    assert all(why_left_out(name) == CARDS for name in cards)
    corpora = ("readme_corpus.parquet", "license-plates.jsonl", "LICENSE_texts.jsonl.zst", "readmes.txt", "README.json")
    assert not any(why_left_out(name) for name in corpora)


@pytest.mark.parametrize("spec", ["/no/such/folder/x", "./no-such-folder/x", "../no-such-folder"])
def test_a_path_where_nothing_is_is_no_name_on_the_hub(spec):
    with pytest.raises(ValueError, match=f"source '{spec}': no such file or directory$"):
        open_source(spec)
