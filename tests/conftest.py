"""Nothing in the suite may reach for the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
import yaml

from tests.support.ranks import MODEL


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small synthetic dataset with the `bytes` tokenizer, for training tests."""
    from data_pipeline.prepare.__main__ import main

    path = tmp_path_factory.mktemp("corpus") / "synthetic"
    code = main(["synthetic", "--output", str(path), "--tokenizer", "bytes", "--validation-fraction", "0.2",
                 "--max-documents", "200"])  # fmt: skip
    assert code == 0
    return path


@pytest.fixture
def settings(tmp_path, corpus):
    """A tiny run's YAML."""
    values = {
        "run": {"name": "tiny", "dir": str(tmp_path / "tiny")},
        "model": MODEL,
        "data": {"path": str(corpus), "seq_len": 48},
        "train": {"steps": 12, "micro_batch_size": 2, "gradient_accumulation": 2, "precision": "fp32"},
        "optim": {"lr": 3e-3, "warmup_steps": 3},
        "loss": {"aux_coef": 0.01, "z_coef": 0.001},
        "checkpoint": {"every": 4, "keep": 2},
        "validation": {"every": 6, "samples": 6},
        "tracking": {"mlflow": False, "plots": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(params=["multiplied in float32", "multiplied in bf16"])
def bf16_products(request, monkeypatch) -> str:
    """Runs a test as on a CPU without instructions for bf16, casting however few rows there are, and as on one with."""
    from gptoss_dist.ops import gemm

    monkeypatch.setattr(gemm, "CPU_MULTIPLIES_BF16", request.param == "multiplied in bf16")
    monkeypatch.setattr(gemm, "MIN_ROWS", 1)
    return request.param
