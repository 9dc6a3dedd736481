"""A run small enough to be started dozens of times."""

import pytest
import yaml
from ranks import MODEL


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
