"""Every kind of source yields its texts, and a bad one gives a line that names file and record."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import open_source
from data_pipeline.corpora import builtin, sources
from data_pipeline.needles.arrange import words_of
from data_pipeline.needles.tasks import TASKS
from tests.support.needles import solve

TEXTS = ["first\ntext", "zweiter Text: ß", "third"]
JSONL = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(spec, **options):
    return list(open_source(str(spec), **options).documents())


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: texts, "id": range(len(texts))}), path, row_group_size=2)


def test_plain_and_compressed_files(tmp_path):
    for suffix, pack in {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(JSONL))
        assert read(tmp_path / f"a.jsonl{suffix}") == TEXTS
        (tmp_path / f"b.txt{suffix}").write_bytes(pack("\ufeffone\r\n\ndocument".encode()))
        assert read(tmp_path / f"b.txt{suffix}") == ["one\r\n\ndocument"]
    # Several members or frames after each other, as `cat a.zst b.zst` makes.
    (tmp_path / "two.jsonl.zst").write_bytes(zstandard.compress(JSONL) + zstandard.compress(JSONL))
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(JSONL) + gzip.compress(JSONL))
    assert read(tmp_path / "two.jsonl.zst") == read(tmp_path / "two.jsonl.gz") == TEXTS * 2
    write_parquet(tmp_path / "c.parquet", TEXTS, "content")
    assert read(tmp_path / "c.parquet", text_column="content") == TEXTS


def test_directories_and_globs_are_sorted_and_skip_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.md").write_text("B")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "ignored.csv").write_text("no")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"C"))
    assert read(tmp_path) == ["A", "C", "B"]
    assert read(tmp_path / "*.txt*") == ["A", "C"]
    assert read(tmp_path / "**/*.md") == ["B"]


def test_blank_lines_and_missing_texts_are_not_errors(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": null}\n  \n{"text": "x"}')
    assert read(tmp_path / "a.jsonl") == ["", "x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "y"}\n', "a.jsonl, line 2: no column 'text', only 'content'"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: column 'text' holds int"),
        ("a.jsonl", b'{"id": ' + b"1" * 5000 + b"}\n", "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.txt", b"ok\xff", r"a.txt: not UTF-8 text \(byte 2"),
        ("a.jsonl.gz", gzip.compress(JSONL * 99)[:-20], r"a.jsonl.gz: cannot be read: .*end-of-stream"),
        ("a.jsonl.gz", JSONL, "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", zstandard.compress(JSONL * 99)[:-5], r"a.jsonl.zst: cannot be read: .*end-of-stream"),
        ("a.jsonl.zst", JSONL, "a.jsonl.zst: cannot be read: zstd"),
        ("a.parquet", b"PAR1 is not enough", "a.parquet: cannot be read as parquet"),
    ],
)
def test_bad_records_name_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_parquet_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"], "content")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text', only 'content', 'id'; .*--text-column"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: column 'id' holds int"):
        read(tmp_path / "a.parquet", text_column="id")


@pytest.mark.parametrize(
    "spec", ["./nothing", "/no/where.txt", "nothing.jsonl", "texts/nothing", "a/b/c", "*.txt", "synthetic:seed=x"]
)
def test_missing_inputs(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()  # so what is not in it is no name on the hub
    with pytest.raises(ValueError, match=r"no such file|no file there|expected synthetic"):
        read(spec)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    for name in ("a.csv", "a.parquet.gz", "noext"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match="no known kind"):
            read(tmp_path / name)


@pytest.mark.parametrize("mebibytes, count", [(8, 1), (9, 2), (32, 4), (33, 8), (209, 28), (1000, 64), (9001, 72)])
def test_large_files_are_cut_into_equal_parts_for_2_or_4_processes(tmp_path, mebibytes, count):
    size = (mebibytes << 20) - 5
    (tmp_path / "a.jsonl").touch()
    os.truncate(tmp_path / "a.jsonl", size)
    parts = open_source(str(tmp_path / "a.jsonl")).parts
    sizes = [part.size for part in parts]
    assert len(parts) == count and sum(sizes) == size and max(sizes) - min(sizes) < count


def touched(path):
    """Give a file another time of change, as a copy of the same name on another machine has."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 1))


def replaced(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"t", b"T"))
    touched(path)  # the clock of a file system may stand still for some milliseconds


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [touched, replaced, cut_off])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.txt", "a.txt.zst"])
@pytest.mark.parametrize("when", ["found", "while"])
def test_a_local_file_that_is_not_the_one_that_was_found_is_noticed(tmp_path, name, when, change):
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(name[-len(name.rpartition(".")[2]) - 1 :], bytes)
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, TEXTS * 2000)
    else:
        path.write_bytes(pack(JSONL * 5000))
    (tmp_path / "b.txt").write_text("a part with the first one if that is text too")
    (part, *_) = pickle.loads(pickle.dumps(open_source(str(tmp_path)).parts))
    records = part.read()
    if when == "while":
        next(records)
    change(path)
    message = rf"{name}: was changed since it was found, or is another file on \S+; leave inputs as they are"
    with pytest.raises(ValueError, match=message) as error:
        list(records)
    assert "\n" not in str(error.value)


def test_python_files_that_change_are_noticed_too(tmp_path, monkeypatch):
    path = tmp_path / "a.py"
    path.write_text("x = 1  # one\n" * 100)
    monkeypatch.setattr(builtin, "_stdlib_files", lambda: [path])
    monkeypatch.setattr(builtin, "_PYSTDLIB_MIN_FILES", 1)
    part = open_source("pystdlib").parts[0]
    assert list(part.read()) == [path.read_text()]
    replaced(path)
    with pytest.raises(ValueError, match=r"a\.py: was changed since it was found"):
        list(part.read())


def test_fingerprints_follow_the_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    before = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == before
    assert open_source(str(path), text_column="id").fingerprint != before
    path.write_bytes(JSONL * 2)
    assert open_source(str(path)).fingerprint != before


def test_synthetic_is_deterministic():
    texts = read("synthetic:documents=50,seed=3")
    assert texts == read("synthetic:documents=50,seed=3") and len(set(texts)) == 50
    assert texts != read("synthetic:documents=50,seed=4")
    assert texts[:10] == read("synthetic:documents=10,seed=3")


def test_pystdlib_is_the_librarys_source_or_says_that_it_is_not(monkeypatch):
    source = open_source("pystdlib")
    texts = list(source.documents())
    assert source.kind == "pystdlib" and len(texts) > 500 and sum(map(len, texts)) > 8e6
    assert any("class JSONDecoder" in text for text in texts)
    assert not any(text.startswith("# system configuration generated") for text in texts)

    monkeypatch.setattr(builtin, "_stdlib_files", list)
    fallback = open_source("pystdlib")
    assert fallback.kind == "synthetic" and "without sources" in fallback.description
    assert next(fallback.documents()).startswith("Note 0.")


_HUGGINGFACE = """
import sys
from types import SimpleNamespace
from data_pipeline import open_source
for split in sys.argv[1:]:
    try:
        source = open_source("someone/Stories", split=split)
        print(source.kind, list(source.documents()))
    except ValueError as error:
        print(error)
"""


def huggingface(directory, *splits):
    """The lines printed by a process of its own, because whether the hub may be asked is decided at import."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "hf"),
        "PATH": "",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", _HUGGINGFACE, *splits]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.heavy
def test_huggingface_dataset_offline(tmp_path):
    write_parquet(tmp_path / "someone/Stories/data/train-00000-of-00001.parquet", TEXTS)
    write_parquet(tmp_path / "someone/Stories/data/validation-00000-of-00001.parquet", ["held out"])
    train, validation, wrong = huggingface(tmp_path, "train", "validation", "tset")
    assert train == f"huggingface {TEXTS}"
    assert validation == "huggingface ['held out']"
    assert "'someone/Stories'" in wrong and "split 'tset'" in wrong and "Bad split" in wrong


def test_an_unreachable_dataset_is_one_line(tmp_path):
    (line,) = huggingface(tmp_path, "train")
    assert line.startswith("source 'someone/Stories' is no built-in corpus"), line


@pytest.mark.parametrize("task", TASKS)
def test_needles_are_questions_with_their_answers(task):
    spec = f"needles:task={task},documents=30,least=110,most=160,seed=3"
    texts = read(spec)
    assert texts == read(spec) and len(set(texts)) == 30
    assert (
        texts[:10] == read(spec.replace("documents=30", "documents=10")) != read(spec.replace("seed=3", "seed=4"))[:10]
    )
    lengths = set()
    for text in texts:
        prompt = text[: re.search(r"(is|are)(?= [\dA-Z, ]+$)", text).end()]
        assert prompt + solve(prompt) == text
        lengths.add(len(words_of(prompt)))
    assert len(lengths) > 10 and min(lengths) >= 110 and max(lengths) <= 160


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needles:task=key", "expected needles:task=passkey|single|"),
        ("needles:words=100", "expected needles:task=passkey|single|"),
        ("needles:least=many", "expected needles:task=passkey|single|"),
        ("needles:least=300", "least=300 is more than most=256; exchange them"),
        ("needles:least=20", "least=20: a length of 20 is too little for the task passkey"),
    ],
)
def test_impossible_needles_are_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(spec)


def test_a_hub_that_is_busy_is_asked_again_for_the_commit(monkeypatch):
    """Else the parts of one machine of many would not be recognised by the others."""
    from huggingface_hub import HfApi

    answers = []

    def info(self, path, **options):
        status = answers.pop(0)
        if status == 200:
            return SimpleNamespace(sha="a" * 40)
        error = RuntimeError("the hub's answer")
        error.response = SimpleNamespace(status_code=status)
        raise error if status else ConnectionError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr("data_pipeline.stores.attempts.time.sleep", lambda seconds: None)
    for given, found in (([429, 503, 200], "a" * 40), ([0], "main"), ([404], "main")):
        answers[:] = given
        assert sources._resolved("owner/set", "main") == found and not answers
    answers[:] = [429] * 8
    with pytest.raises(ValueError, match=r"hf://datasets/owner/set: the hub does not say which commit .*\(8 tries in"):
        sources._resolved("owner/set", "main")
