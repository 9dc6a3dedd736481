"""Every corruption tried is refused with one line that names the file and the remedy; sound data is read only once."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Manifest, load_tokenizer, open_source
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.shards import checksums as verify
from data_pipeline.shards.checksums import STAMP_FILE_NAME, check_content, record_content
from data_pipeline.shards.megatron import IndexedReader
from data_pipeline.shards.writer import SplitWriter, document_batches
from data_pipeline.tools.verify import main

PARTS = 3


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Documents of equal length, so that shards have equal sizes and only their content tells them apart."""
    folder = tmp_path_factory.mktemp("sound")
    lines = [json.dumps({"text": f"document number {i:03d} has 32 bytes"}) for i in range(100)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    options = {"validation_fraction": 0.2, "shard_tokens": 700, "report": lambda _: None}
    prepare([open_source(str(folder / "corpus.jsonl"))], folder / "data", load_tokenizer("bytes"), **options)
    assert len(Manifest.read(folder / "data").splits["train"]) > 3
    assert not verify.unread_shards(folder / "data", Manifest.read(folder / "data"))  # what was just written is known
    return folder / "data"


@pytest.fixture
def data(sound, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(sound, copy)
    record_content(copy, Manifest.read(copy))
    return copy


def rewrite(name, change):
    """A corruption: the bytes of one file changed."""
    return lambda data: (data / name).write_bytes(change((data / name).read_bytes()))


def flip(position):
    return lambda b: b[:position] + bytes([b[position] ^ 0x10]) + b[position + 1 :]


def flip_last(b):
    return b[:-1] + bytes([b[-1] ^ 1])


def edit_manifest(change):
    def corrupt(data):
        fields = json.loads((data / "manifest.json").read_text())
        change(fields)
        (data / "manifest.json").write_text(json.dumps(fields))

    return corrupt


def swap(suffixes):
    def corrupt(data):
        for suffix in suffixes:
            one, two = data / f"train-00000{suffix}", data / f"train-00001{suffix}"
            one.rename(data / "swap")
            two.rename(one)
            (data / "swap").rename(two)

    return corrupt


def rewritten_consistently(change, **listed):
    """train-00001 written anew from changed tokens, with every hash right: only the tokens themselves can tell."""

    def corrupt(data):
        manifest = Manifest.read(data)
        ((tokens, lengths),) = document_batches(IndexedReader(data / "train-00001"))
        writer = SplitWriter(data, "train", tokens.dtype, 1 << 20)
        writer._shards = manifest.splits["train"][:1]
        writer.add_documents(change(tokens), lengths)
        shard = replace(writer.close()[-1], **listed)
        splits = manifest.splits | {"train": [*manifest.splits["train"][:1], shard, *manifest.splits["train"][2:]]}
        (data / "manifest.json").write_bytes(replace(manifest, splits=splits).to_json())

    return corrupt


def with_token(token, position):
    def change(tokens):
        tokens = tokens.copy()
        tokens[position] = token
        return tokens

    return change


def other_tokenizer(data):
    load_tokenizer("builtin").save(data)


def remove(name):
    return lambda data: (data / name).unlink()


CORRUPTIONS = {
    "truncated bin": (rewrite("train-00001.bin", lambda b: b[:-2]), "train-00001.bin: truncated"),
    "longer bin": (rewrite("train-00001.bin", lambda b: b + b[-2:]), "train-00001.bin: truncated or damaged"),
    "empty bin": (rewrite("train-00001.bin", lambda b: b""), "train-00001.bin: truncated"),
    "missing bin": (remove("validation-00000.bin"), "validation-00000.bin: cannot be opened"),
    "flipped first byte of bin": (rewrite("train-00002.bin", flip(0)), "train-00002.bin: content differs"),
    "flipped byte of bin": (rewrite("train-00002.bin", flip(500)), "train-00002.bin: content differs"),
    "flipped last byte of bin": (rewrite("validation-00000.bin", flip_last), "validation-00000.bin: content differs"),
    "truncated idx": (rewrite("train-00001.idx", lambda b: b[:-8]), "train-00001.idx: truncated"),
    "header only": (rewrite("train-00001.idx", lambda b: b[:34]), "train-00001.idx: truncated"),
    "empty idx": (rewrite("train-00001.idx", lambda b: b""), "train-00001.idx: truncated"),
    "missing idx": (remove("train-00001.idx"), "train-00001.idx: cannot be opened"),
    "flipped magic": (rewrite("train-00001.idx", flip(0)), "train-00001.idx: not a Megatron index"),
    "flipped dtype": (rewrite("train-00001.idx", flip(17)), "train-00001.idx: dtype code 24"),
    "dtype of the index": (rewrite("train-00001.idx", lambda b: b[:17] + b"\4" + b[18:]), "train-00001.bin: truncated"),
    "flipped count": (rewrite("train-00001.idx", flip(18)), "train-00001.idx: truncated or damaged"),
    "flipped documents": (rewrite("train-00001.idx", flip(26)), "train-00001.idx: truncated or damaged"),
    "flipped length": (rewrite("train-00001.idx", flip(38)), "train-00001.idx: damaged index, its pointers"),
    "flipped pointer": (rewrite("train-00001.idx", flip(34 + 20 * 4 + 8)), "train-00001.idx: damaged index, its"),
    "flipped document index": (rewrite("train-00001.idx", flip_last), "train-00001.idx: damaged index, its documents"),
    "swapped shards": (swap([".bin", ".idx"]), "train-00000.bin: content differs from manifest.json, it is that of"),
    "swapped bins": (swap([".bin"]), "train-00000.bin: content differs from manifest.json, it is that of train-00001"),
    "manifest dtype": (
        edit_manifest(lambda m: m.update(dtype="int32")),
        "manifest.json: damaged manifest: content_sha",
    ),
    "manifest storage": (edit_manifest(lambda m: m.update(storage="raw")), "train-00000: cannot be opened"),
    "manifest cut": (rewrite("manifest.json", lambda b: b[:-9]), "manifest.json: truncated or damaged"),
    "manifest empty": (rewrite("manifest.json", lambda b: b""), "manifest.json: truncated or damaged"),
    "manifest missing": (remove("manifest.json"), "manifest.json cannot be read"),
    "manifest of one shard twice": (
        edit_manifest(lambda m: m["splits"]["train"]["shards"][1].update(name="train-00000")),
        "manifest.json: damaged manifest: a shard is listed twice",
    ),
    "manifest vocabulary": (edit_manifest(lambda m: m["tokenizer"].update(n_vocab=999)), "its n_vocab is 265, not 999"),
    "manifest end of text": (
        edit_manifest(lambda m: m["tokenizer"].update(eot_id=256)),
        "manifest.json: damaged manifest: content_sha256",
    ),
    "other tokenizer": (other_tokenizer, "tokenizer.gptoss.json: not the tokenizer of manifest.json"),
    "tokenizer missing": (remove("tokenizer.gptoss.json"), "no tokenizer in"),
    "tokenizer ranks changed": (
        rewrite("tokenizer.tiktoken", lambda b: b.replace(b" 255\n", b" 300\n")),
        "tokenizer.gptoss.json: damaged tokenizer",
    ),
    "id beyond the vocabulary": (
        rewritten_consistently(with_token(300, 3)),
        "train-00001.bin: holds token id 300, beyond the vocabulary of 265 ids",
    ),
    "id beyond it, not listed": (
        rewritten_consistently(with_token(265, 3), max_token=None),
        "train-00001.bin: token id 265 is not one of the 265 ids",
    ),
    "document without its end": (
        rewritten_consistently(with_token(7, 2 * 33 - 1)),
        "train-00001.bin: the document that ends at token 65 does not end with the end-of-text id 257",
    ),
    "largest id": (
        rewritten_consistently(lambda tokens: tokens, max_token=3),
        "train-00001.bin: the largest id is 257",
    ),
    "documents counted wrong": (rewritten_consistently(lambda tokens: tokens, documents=7), "train-00001.idx: holds"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_one_line_with_file_and_remedy(data, name, capsys):
    corrupt, message = CORRUPTIONS[name]
    corrupt(data)
    problems = []
    for part in range(PARTS):  # the ranks of a run: together they read everything
        try:
            check_content(data, Manifest.read(data), part=part, parts=PARTS)
        except ValueError as error:
            problems.append(str(error))
    assert any(message in problem for problem in problems), problems
    for problem in problems:
        assert "\n" not in problem and str(data) in problem, problem
        assert any(word in problem for word in ("restore it", "make the dataset again", "make one with")), problem

    assert main([str(data)]) == (1 if (data / "manifest.json").exists() else 2)
    out, err = capsys.readouterr()
    assert not out and message in err and all(line.startswith("error: ") for line in err.splitlines()), err


def test_verify_lists_all_problems_and_sound_data_is_a_summary(data, capsys):
    assert main([str(data), "--workers", "2"]) == 0
    assert "sound, 3,300 tokens in 100 documents" in capsys.readouterr().out
    rewrite("train-00000.bin", flip(9))(data)
    remove("train-00002.idx")(data)
    (data / "train-00077.bin").write_bytes(b"ab")
    other_tokenizer(data)
    assert main([str(data)]) == 1
    lines = capsys.readouterr().err.splitlines()
    files = ("tokenizer.gptoss.json", "train-00000.bin", "train-00002.idx", "train-00077.bin")
    assert [next(file for file in files if f"{data / file}: " in line) for line in lines] == list(files)


def test_what_was_read_is_not_read_again_unless_it_changed(data, monkeypatch):
    manifest = Manifest.read(data)
    shards = [shard.name for shards in manifest.splits.values() for shard in shards]
    scanned, scan = [], verify.scan
    monkeypatch.setattr(
        verify, "scan", lambda reader, eot_id: scanned.append(reader.file.path.stem) or scan(reader, eot_id)
    )

    def scans(**options):
        scanned.clear()
        check_content(data, manifest, **options)
        return sorted(scanned)

    assert scans() == [] and scans(always=True) == sorted(shards)
    os.utime(data / "train-00001.bin")
    os.utime(data / "train-00003.idx")
    assert scans() == ["train-00001", "train-00003"]
    record_content(data, manifest)
    assert scans() == []

    # The ranks divide the shards evenly, and the union of their shares is everything.
    shares = [scans(part=part, parts=PARTS, always=True) for part in range(PARTS)]
    assert sorted(itertools.chain(*shares)) == sorted(shards) and max(map(len, shares)) - min(map(len, shares)) <= 1

    # The stamp is a cache: damaged, of another dataset or absent it vouches for nothing.
    for stamp in (b"", b"[1]", b'{"content_sha256": 1, "files": 2}', None):
        (data / STAMP_FILE_NAME).unlink() if stamp is None else (data / STAMP_FILE_NAME).write_bytes(stamp)
        assert scans() == sorted(shards)
    record_content(data, manifest)
    state = (data / "train-00000.bin").stat()
    rewrite("train-00000.bin", flip(3))(data)
    os.utime(data / "train-00000.bin", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match=r"train-00000\.bin: content differs"):
        scans()
    record_content(data, manifest)
    assert scans() == [], "what is recorded is believed"
    with pytest.raises(ValueError, match=r"train-00000\.bin: content differs"):
        scans(always=True)
    with pytest.raises(ValueError, match="part 3 of 3"):
        check_content(data, manifest, part=3, parts=3)


def test_the_stamp_does_not_vouch_for_a_copy(data, tmp_path):
    """`cp -a` and `rsync -a` carry over verified.json and modification times, also to a disk that damages a byte."""
    copy, manifest = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copy2), Manifest.read(data)
    shard = copy / "train-00000.bin"
    rewrite(shard.name, flip(3))(copy)
    os.utime(shard, ns=(0, (data / shard.name).stat().st_mtime_ns))
    assert not verify.unread_shards(data, manifest)
    assert verify.unread_shards(copy, manifest) == [s for shards in manifest.splits.values() for s in shards]
    with pytest.raises(ValueError, match=r"copy/train-00000\.bin: content differs"):
        check_content(copy, manifest)


def test_a_read_only_directory_is_no_error(data, monkeypatch):
    (data / STAMP_FILE_NAME).unlink()

    def refuse(path: Path, content: bytes):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(verify, "write_file_atomically", refuse)
    record_content(data, Manifest.read(data))
    assert not (data / STAMP_FILE_NAME).exists()


def test_ends_of_documents_are_found_at_every_edge_of_a_chunk(data, monkeypatch):
    reader = IndexedReader(data / "train-00000")
    reader.check()
    ends = np.cumsum(reader.lengths) - 1
    for size in (1, 32, 33, 34, 10_000):
        found = [
            reader.ends_within(start, min(start + size, reader.n_tokens)) for start in range(0, reader.n_tokens, size)
        ]
        assert np.concatenate(found).tolist() == ends.tolist()
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 66)
    check_content(data, Manifest.read(data), always=True)


def test_random_damage_to_any_file_is_refused_or_harmless(data):
    generator = np.random.default_rng(0)
    files = sorted(path for path in data.iterdir() if path.name != "prepare.json")
    for _ in range(200):
        path = files[generator.integers(len(files))]
        content = path.read_bytes()
        at = int(generator.integers(len(content)))
        damaged = (
            content[:at],
            flip(at)(content),
            content[:at] + bytes(8) + content[at + 8 :],
            content[:at] + b"null" + content[at + 1 :],
            content[: at + 9] + content[at:],
        )[generator.integers(5)]
        if damaged == content:
            continue
        path.write_bytes(damaged)
        try:
            check_content(data, Manifest.read(data))
        except ValueError as error:
            assert "\n" not in str(error) and str(data) in str(error)
        else:
            # An entry of no consequence, a rank listed twice, or the cache. Never tokens.
            assert path.suffix in (".json", ".tiktoken"), path
        path.write_bytes(content)
