"""Nothing in the suite may reach for the network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small synthetic dataset with the `bytes` tokenizer, for training tests."""
    from data_pipeline.prepare import main

    path = tmp_path_factory.mktemp("corpus") / "synthetic"
    code = main(["synthetic", "--output", str(path), "--tokenizer", "bytes", "--validation-fraction", "0.2",
                 "--max-documents", "200"])  # fmt: skip
    assert code == 0
    return path
