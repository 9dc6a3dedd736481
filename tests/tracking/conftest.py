"""A database of MLflow, made once: creating its tables takes seconds."""

import shutil

import pytest

from gptoss_dist.tracking.delivery.database import Database
from gptoss_dist.tracking.delivery.environment import prepare_environment

VARIABLES = (
    *("TRACKING_URI", "RUN_ID", "PARENT_RUN_ID", "RUN_NAME", "EXPERIMENT_NAME", "EXPERIMENT_ID", "TAGS"),
    *("TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN", "TRACKING_INSECURE_TLS"),
    "ENABLE_SYSTEM_METRICS_LOGGING",
)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    prepare_environment()
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Database(path).prepare(pytest.fail)
    assert sorted(file.name for file in path.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    return path


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)
