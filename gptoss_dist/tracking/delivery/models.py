"""Checkpoints as logged models of MLflow 3: their step, place and metrics. No weights are sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_dist.tracking.delivery.requests import clean_key, clean_text
from gptoss_dist.tracking.records import Checkpoint

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

MODEL_TYPE = "checkpoint"
_ON_DISK = "on_disk"
_MOST_LOOKED_AT = 100


class LoggedModels:
    """The checkpoints of one run, each a logged model `step_00000100`.

    Args:
        client: An MlflowClient.
        run_id: The run.
        run_dir: Its folder, by which it is seen which checkpoints are still there.
        message: What tells the user.
    """

    def __init__(self, client: Any, run_id: str, run_dir: Path, message: Callable[[str], None]) -> None:
        self._client, self._run_id, self._run_dir, self._message = client, run_id, run_dir, message

    def log(self, record: Checkpoint) -> bool:
        """Make the model of a checkpoint, unless it is there, and tag those whose checkpoint has been removed since.

        Returns:
            Whether the server has logged models; one that has none is told once.
        """
        if not hasattr(self._client, "create_logged_model"):
            self._message("this version of MLflow has no logged models: checkpoints are in the run's folder only")
            return False
        try:
            self._log(record)
        except Exception as error:
            if getattr(error, "error_code", None) not in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
                raise
            self._message("MLflow's server has no logged models: checkpoints are in the run's folder only")
            return False
        return True

    def _log(self, record: Checkpoint) -> None:
        from mlflow.entities import LoggedModelOutput, Metric

        client, name = self._client, f"step_{record.step:08d}"
        experiment = client.get_run(self._run_id).info.experiment_id
        known = client.search_logged_models(
            [experiment], filter_string=f"source_run_id = '{self._run_id}'", max_results=_MOST_LOOKED_AT
        )
        self._tag_removed([model for model in known if model.name != name])
        model = next((model for model in known if model.name == name), None)
        if model is None:
            model = client.create_logged_model(
                experiment,
                name=name,
                source_run_id=self._run_id,
                tags={"path": clean_text(record.path), _ON_DISK: "yes"},
                params={"step": str(record.step)},
                model_type=MODEL_TYPE,
            )
        client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, record.step)])
        at = round(1000 * record.time)
        metrics = [
            Metric(clean_key(key), value, at, record.step, model_id=model.model_id)
            for key, value in record.metrics.items()
        ]
        client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        client.finalize_logged_model(model.model_id, "READY")

    def _tag_removed(self, models: list[LoggedModel]) -> None:
        if not self._run_dir.is_dir():
            return
        for model in models:
            path = model.tags.get("path")
            if path and model.tags.get(_ON_DISK) == "yes" and not (self._run_dir / path).exists():
                self._client.set_logged_model_tags(model.model_id, {_ON_DISK: "removed"})
