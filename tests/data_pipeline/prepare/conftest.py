"""A corpus for the tests of `prepare`."""

import json

import pytest

from data_pipeline import open_source


@pytest.fixture
def corpus(tmp_path):
    """400 documents of which some are equal, empty, broken or long."""
    texts = list(open_source("synthetic:documents=400").documents())
    texts += [texts[3], texts[7], "", "lone \ud800 surrogate", "lone \ufffd surrogate", "<|endoftext|>", "long " * 5000]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
