"""Exported models in MLflow's registry, on request."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_pipeline.foreign import read_json
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.database import Database
from gptoss_dist.tracking.delivery.environment import DeliveryRefused, find_store, prepare_environment
from gptoss_dist.tracking.delivery.requests import is_unknown, one_line
from gptoss_dist.tracking.records import JOURNAL_FILE

logger = logging.getLogger(__name__)

MODEL_TYPE = "export"
_EXPERIMENT = "gptoss_dist"
"""For the export of a model that comes from no run."""


def register_export(
    name: str, folder: str | Path, source: str | Path, *, uri: str | None = None, upload: bool = False
) -> str:
    """Make an export a version of a registered model; sets mlflow's tracking URI for the process.

    The version is made of a logged model of the run that the weights come from. Without `upload` MLflow has no file of
    it: tag `path` of the version says where they are.

    Args:
        name: The registered model, which is created if there is none.
        folder: The export.
        source: What was exported: the folder of a run or checkpoint tells the run in MLflow.
        uri: Where MLflow is; without it `MLFLOW_TRACKING_URI`, then where the run was tracked.
        upload: Send the files of the export.

    Returns:
        What was registered where, for the user.

    Raises:
        ValueError: MLflow is not there, does not answer or refuses; the export itself is complete.
    """
    prepare_environment()
    folder, run_dir = Path(folder), _run_dir(Path(source))
    cursor = Cursor.load(run_dir, logger.debug) if run_dir is not None else Cursor()
    store = find_store(uri, cursor, run_dir or Path.cwd())
    try:
        store.require_address()
        address = store.uri
        if store.database is not None:
            database = Database(store.database, store.options)
            database.prepare(logger.warning)
            address = database.uri
        version = _register(name, folder, cursor.run_id, address, upload)
    except DeliveryRefused as error:
        raise ValueError(f"{folder} is exported, but not registered: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{folder} is exported, but not registered in MLflow at {without_secrets(store.uri)}: {one_line(error)}"
        ) from error
    files = "with its files" if upload else f"its files stay in {folder.absolute()}"
    return f"registered: {name}, version {version}, in MLflow at {without_secrets(store.uri)}; {files}"


def _run_dir(source: Path) -> Path | None:
    """Return the folder of the run that a run's folder or a checkpoint belongs to."""
    for folder in (source, *source.absolute().parents[:2]):
        if (folder / JOURNAL_FILE).is_file():
            return folder
    return None


def _register(name: str, folder: Path, run_id: str | None, uri: str, upload: bool) -> str:
    import mlflow
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(uri)  # the registry looks the logged model up where the process logs to
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient()
    run = _run(client, run_id)
    tags = {"path": str(folder.absolute()), "files": "uploaded" if upload else "not uploaded"}
    model = client.create_logged_model(
        run.info.experiment_id if run else _experiment(client),
        name=folder.name,
        source_run_id=run.info.run_id if run else None,
        tags=tags,
        params=_sizes(folder),
        model_type=MODEL_TYPE,
    )
    if upload:
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id = run.info.run_id if run else None
    return client.create_model_version(
        name, f"models:/{model.model_id}", run_id, tags=tags, model_id=model.model_id
    ).version


def _run(client: Any, run_id: str | None) -> Any:
    """Return the run of these weights, None if this server does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if not is_unknown(error):
            raise
        return None


def _experiment(client: Any) -> str:
    found = client.get_experiment_by_name(_EXPERIMENT)
    return found.experiment_id if found else client.create_experiment(_EXPERIMENT)


def _sizes(folder: Path) -> dict[str, str]:
    """Return what an export's config.json says of its architecture, if it has one."""
    try:
        config = read_json(folder / "config.json", dict[str, Any])
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in config.items() if isinstance(value, (int, str, float))}
