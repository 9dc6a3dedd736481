"""The tokenizer beside a model against that of data."""

import json

import pytest

from data_pipeline.tokenizer.comparison import difference
from data_pipeline.tokenizer.huggingface import huggingface_files
from data_pipeline.tokenizer.published import load_tokenizer

BYTES, BUILTIN = load_tokenizer("bytes"), load_tokenizer("builtin")


def test_beside_a_checkpoint(tmp_path):
    assert difference(tmp_path, BYTES) is None
    BYTES.save(tmp_path)
    assert difference(tmp_path, BYTES) == ""
    assert difference(tmp_path, BUILTIN) == "it was trained with tokenizer bytes (265 ids)"


def test_beside_a_model_of_transformers(tmp_path):
    values = huggingface_files(BUILTIN, 64)["tokenizer.json"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    assert difference(tmp_path, BUILTIN) == ""
    assert difference(tmp_path, load_tokenizer("builtin", vocab_size=1000)).endswith(" tokens are there only")
    vocabulary = values["model"]["vocab"]
    vocabulary["th"], vocabulary["he"] = vocabulary["he"], vocabulary["th"]
    path.write_text(json.dumps(values))
    assert difference(tmp_path, BUILTIN).startswith("2 of 4096 tokens have other ids in tokenizer.json, and 0 ")
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.5]]}}))
    assert difference(tmp_path, BUILTIN).startswith("4096 of 4096 tokens have other ids")
    for text in (b"\xff", b"{", b"[" * 100000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: "):
            difference(tmp_path, BUILTIN)
