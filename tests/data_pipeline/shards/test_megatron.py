"""Our shards are Megatron-LM's: read by an independent reader written from the format, and by Megatron-LM's own
IndexedDataset and back where `megatron-core` is installed (`pip install --no-deps megatron-core==0.16.1`).
"""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import IndexedReader, load_tokenizer, open_source
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.shards.checksums import check_content
from data_pipeline.shards.manifest import Manifest, open_shards
from data_pipeline.shards.writer import SplitWriter
from data_pipeline.tools.adopt import adopt


def read_by_the_format(prefix):
    """Documents of PREFIX.bin/.idx, and nothing of ours: struct and the layout of _IndexWriter in
    megatron/core/datasets/indexed_dataset.py.
    """
    index, data = (Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin"))
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    letter, size = {4: ("i", 4), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    pointers = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    starts = struct.unpack_from(f"<{documents}q", index, 34 + 12 * sequences)
    assert version == 1 and len(index) == 34 + 12 * sequences + 8 * documents
    assert len(data) == sum(lengths) * size
    sequence = [struct.unpack_from(f"<{n}{letter}", data, at) for n, at in zip(lengths, pointers)]
    return [sum(sequence[a:b], ()) for a, b in pairwise(starts)]


def read_by_megatron(prefix):
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    read = []
    for mmap in (True, False):
        dataset = module.IndexedDataset(str(prefix), mmap=mmap)
        starts = dataset.document_indices.tolist()
        assert dataset.sequence_lengths.tolist() == [len(dataset[i]) for i in range(len(dataset))]
        read.append([tuple(np.concatenate(dataset[a:b]).tolist()) for a, b in pairwise(starts)])
        assert tuple(dataset.get(len(starts) - 2, offset=1, length=2).tolist()) == read[-1][-1][1:3]
    assert read[0] == read[1]
    return read[0]


@pytest.fixture(scope="module", params=["uint16", "int32"])
def written(request, tmp_path_factory):
    """(directory, documents that went in): several shards of a prepared dataset, or of ids beyond 65,535."""
    directory = tmp_path_factory.mktemp("megatron") / "data"
    if request.param == "uint16":
        source, tokenizer = open_source("synthetic:documents=120"), load_tokenizer("builtin")
        prepare([source], directory, tokenizer, validation_fraction=0, shard_tokens=9000, report=lambda _: None)
        return directory, [(*tokenizer.encode(text).tolist(), tokenizer.eot_id) for text in source.documents()]
    directory.mkdir()
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 201_088, n) for n in [3, *generator.integers(1, 700, 100), 5000, 4]]
    writer = SplitWriter(directory, "train", np.dtype("<i4"), 4000)
    for document in documents[:50]:
        writer.add(document)
    writer.add_documents(np.concatenate(documents[50:]), [len(document) for document in documents[50:]])
    shards = writer.close()
    assert all(shard.tokens <= 4000 or shard.documents == 1 for shard in shards)
    assert sum(shard.tokens for shard in shards) == sum(map(len, documents))
    return directory, [tuple(document.tolist()) for document in documents]


@pytest.mark.parametrize("read", [read_by_the_format, read_by_megatron])
def test_identical_tokens_and_documents(written, read):
    directory, documents = written
    prefixes = sorted(path.with_suffix("") for path in directory.glob("train-*.idx"))
    assert len(prefixes) > 3
    assert [document for prefix in prefixes for document in read(prefix)] == documents


@pytest.mark.parametrize("n_vocab", [265, 201_088])
def test_what_megatron_writes_is_adopted(tmp_path, n_vocab):
    module, torch = pytest.importorskip("megatron.core.datasets.indexed_dataset"), pytest.importorskip("torch")
    tokenizer = load_tokenizer("bytes")
    tokenizer.n_vocab = n_vocab  # which decides Megatron's dtype, as it does ours
    documents = [[*text.encode(), tokenizer.eot_id] for text in ("one", "another document", "x")]
    builder = module.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=module.DType.optimal_dtype(n_vocab))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "x.idx"))
    manifest = adopt(tmp_path, tokenizer, train=["x"], report=lambda _: None)
    assert manifest.dtype == ("uint16" if n_vocab < 65_536 else "int32")
    (reader,) = open_shards(tmp_path, manifest, "train")
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    if n_vocab == 265:
        check_content(tmp_path, Manifest.read(tmp_path), always=True)


def test_documents_of_several_sequences_are_refused(tmp_path):
    module, torch = pytest.importorskip("megatron.core.datasets.indexed_dataset"), pytest.importorskip("torch")
    builder = module.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 6])  # as with --split-sentences
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(ValueError, match=r"x\.idx: 1 documents of 2 sequences; .* without --split-sentences"):
        IndexedReader(tmp_path / "x")
