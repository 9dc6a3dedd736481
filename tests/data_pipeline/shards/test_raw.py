"""Raw token files of other projects, and Megatron's without a manifest: adopted, or refused for a reason."""

import io
import re

import numpy as np
import pytest

from data_pipeline import Manifest, TokenDataset, load_tokenizer
from data_pipeline.shards.checksums import check_content
from data_pipeline.shards.manifest import open_shards
from data_pipeline.shards.megatron import IndexedWriter
from data_pipeline.shards.raw import RawReader
from data_pipeline.shards.writer import document_batches
from data_pipeline.tools.adopt import main
from data_pipeline.tools.verify import main as verify

EOT, N_VOCAB = 257, 265  # of the tokenizer `bytes`
DOCUMENTS = [[*b"one"], [*b"two!"], [], [*b"three"]]  # an empty document is its end-of-text alone
FLAT = [token for document in DOCUMENTS for token in [*document, EOT]]


def npy(tokens):
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    return buffer.getvalue()


def bare(tokens):
    return tokens.tobytes()


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def adopt(directory, *options):
    return main([str(directory), "--tokenizer", "bytes", "--train", *options])


@pytest.mark.parametrize("write", [bare, npy])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("tail", [[], [*b"no end"]])
def test_documents_and_tokens_of_a_raw_file(tmp_path, monkeypatch, write, dtype, tail):
    monkeypatch.setattr("data_pipeline.shards.raw._CHUNK_TOKENS", 3)
    path = tmp_path / "tokens.npy"
    path.write_bytes(write(np.array(FLAT + tail, dtype)))
    reader = RawReader(path, dtype, eot_id=EOT, n_vocab=N_VOCAB)
    reader.check()
    expected = [[*document, EOT] for document in DOCUMENTS] + ([tail] if tail else [])
    assert [reader[i].tolist() for i in range(len(reader))] == expected
    assert reader.lengths.tolist() == [len(document) for document in expected]
    assert reader.n_tokens == len(FLAT + tail) and reader.dtype == np.dtype(dtype)
    assert reader.file.read(2, 4).tolist() == (FLAT + tail)[2:6]
    for limit in (1, 6, 1000):
        monkeypatch.setattr("data_pipeline.shards.writer._BATCH_TOKENS", limit)
        batches = list(document_batches(reader))
        assert np.concatenate([tokens for tokens, _ in batches]).tolist() == FLAT + tail
        assert np.concatenate([lengths for _, lengths in batches]).tolist() == reader.lengths.tolist()


@pytest.mark.parametrize("write", [bare, npy])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_adopted_raw_files_train_like_any_other(tmp_path, capsys, write, dtype):
    train = np.array(FLAT * 30, dtype)
    for name, tokens in (("train_1.bin", train[:200]), ("train_2.bin", train[200:]), ("val.bin", train[:50])):
        (tmp_path / name).write_bytes(write(tokens))
    (tmp_path / "meta.pkl").write_bytes(b"mine")
    before = contents(tmp_path)
    assert adopt(tmp_path, "train*.bin", "--validation", "val.bin", "--dtype", dtype) == 0
    assert f"train {len(train)} tokens in" in capsys.readouterr().out
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {
        "manifest.json",
        "tokenizer.gptoss.json",
        "tokenizer.tiktoken",
        "verified.json",
    }
    assert all(after[name] == data for name, data in before.items()), "nothing else is touched"

    dataset = TokenDataset(tmp_path, seq_len=11, shuffle=False)
    count = dataset.samples_per_epoch
    expected = np.stack([train[i * 11 : i * 11 + 12] for i in range(count)]).astype(np.int64)
    assert np.array_equal(dataset.samples(np.arange(count)), expected)
    manifest = Manifest.read(tmp_path)
    assert manifest.storage == "raw" and manifest.splits["train"][0].max_token == EOT
    documents = [len(reader) for split in manifest.splits for reader in open_shards(tmp_path, manifest, split)]
    assert documents == [shard.documents for shards in manifest.splits.values() for shard in shards]
    check_content(tmp_path, manifest, always=True)
    assert verify([str(tmp_path)]) == 0

    assert adopt(tmp_path, "train*.bin", "--dtype", dtype) == 2 and "manifest.json: exists" in capsys.readouterr().err
    (tmp_path / "val.bin").write_bytes(write(np.where(train[:50] == 111, 300, train[:50]).astype(dtype)))
    with pytest.raises(ValueError, match=r"val\.bin: content differs .* restore it"):
        check_content(tmp_path, manifest)
    (tmp_path / "val.bin").write_bytes(before["val.bin"][:-1])
    with pytest.raises(ValueError, match=r"val\.bin: truncated.* restore it"):
        check_content(tmp_path, manifest)


LONG = np.array(FLAT * 20)
BEYOND = np.where(np.arange(len(LONG)) == 300, 265, LONG)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (bare(LONG.astype("u4")), ["--dtype", "uint16"], "every second id is next to nothing.* use --dtype uint32"),
        (bare(LONG[:320].astype("u2")), ["--dtype", "uint32"], "is not one of 265 ids; as uint16 it would fit: use"),
        (bare(LONG[:320].astype("u2")), ["--dtype", "int32"], "is not one of 265 ids; as uint16 it would fit: use"),
        (bare(LONG[:319].astype("u2")), ["--dtype", "int32"], "no whole number of int32 ids; as uint16 it would fit"),
        (bare(LONG.astype("u2"))[:-1], ["--dtype", "uint16"], "no whole number of uint16 ids; restore the"),
        (bare(LONG.astype(">u2")), ["--dtype", "uint16"], "is not one of 265 ids; restore the file, or name"),
        (bare(BEYOND.astype("u2")), ["--dtype", "uint16"], "token id 265 is not one of 265 ids; restore the file, or"),
        (bare(-LONG.astype("i4")), ["--dtype", "int32"], "token id -257 is not one of 265 ids"),
        (b"", ["--dtype", "uint16"], "holds no tokens"),
        (npy(LONG.astype("u2")), ["--dtype", "uint32"], "its header says uint16, not uint32; use --dtype uint16"),
        (npy(LONG.astype("u2"))[:-2], [], "truncated or damaged"),
        (npy(LONG), [], "holds <i8, not little endian uint16, uint32, int32; convert it"),
        (npy(LONG.astype(">u4")), [], "holds >u4, not little endian"),
        (npy(np.array([{}], dtype=object)), [], r"holds \|O, not"),
        (npy(LONG.astype("u2"))[:40], [], "damaged .npy header"),
        (bare(LONG.astype("u2")), [], "does not say its dtype; give --dtype"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, capsys, data, options, message):
    (tmp_path / "train.bin").write_bytes(data)
    assert adopt(tmp_path, "train.bin", *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {tmp_path / 'train.bin'}: "), err
    assert re.search(message, err), err
    assert contents(tmp_path) == {"train.bin": data}, "nothing was written"


def test_ids_beyond_the_vocabulary_are_found_far_inside(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_pipeline.shards.raw._PROBE_BYTES", 100)
    (tmp_path / "train.bin").write_bytes(bare(BEYOND.astype("u2")))
    assert adopt(tmp_path, "train.bin", "--dtype", "uint16") == 2
    assert "train.bin: token id 265 is not one of the 265 ids of tokenizer bytes; name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def megatron(prefix, documents, dtype="<u2"):
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document))


def test_megatron_files_without_a_manifest(tmp_path, capsys):
    whole = [[*document, EOT] for document in DOCUMENTS]
    for name in ("a_text_document", "b_text_document"):
        megatron(tmp_path / name, whole)
    assert adopt(tmp_path, "[ab]_text_document", "--validation", "missing") == 2
    assert "missing: matches no file" in capsys.readouterr().err
    assert adopt(tmp_path, "[ab]_text_document", "--validation", "a*.bin") == 2
    assert "a_text_document: in both splits" in capsys.readouterr().err
    for name in ("c", "d"):
        megatron(tmp_path / name, [])
    before = contents(tmp_path)
    assert adopt(tmp_path, "c", "--train", "d", "--validation", "a_text_document") == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}: no token for training in c, d; name other files with --train" in err and err.count("\n") == 1
    assert contents(tmp_path) == before
    assert adopt(tmp_path, "a_text_document", "--train", "c", "--validation", "d", "--validation=b*.bin") == 0
    manifest = Manifest.read(tmp_path)
    assert manifest.storage == "megatron" and manifest.documents("train") == manifest.documents("validation") == 4
    listed = {split: [shard.name for shard in shards] for split, shards in manifest.splits.items()}
    assert listed == {"train": ["a_text_document", "c"], "validation": ["d", "b_text_document"]}
    assert verify([str(tmp_path)]) == 0
    data = (tmp_path / "a_text_document.idx").read_bytes()
    (tmp_path / "a_text_document.idx").write_bytes(data[:-1] + b"\7")
    with pytest.raises(ValueError, match=r"a_text_document\.idx: damaged index"):
        check_content(tmp_path, manifest)

    other = tmp_path / "other"
    other.mkdir()
    for documents, options, message in (
        ([[*b"unended"]], [], "does not end with the end-of-text id 257; make the dataset again (in Megatron-LM with"),
        ([[999, EOT]], [], "x.bin: token id 999 is not one of the 265 ids"),
        (whole, ["--dtype", "uint32"], "x.idx: says uint16, not uint32"),
    ):
        megatron(other / "x", documents)
        assert adopt(other, "x", *options) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    load_tokenizer("builtin").save(other)
    assert adopt(other, "x") == 2 and "another tokenizer; move it away" in capsys.readouterr().err
    (other / "y.bin").write_bytes(bare(LONG.astype("u2")))
    assert main([str(other), "--tokenizer", "builtin", "--train", "x", "y.bin", "--dtype", "uint16"]) == 2
    assert "y.bin: raw uint16 where x is megatron uint16; adopt them apart" in capsys.readouterr().err
