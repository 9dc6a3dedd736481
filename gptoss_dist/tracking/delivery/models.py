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
"""A tag: `yes`, `no` (not yet, or it could not be written), `removed`; absent where nobody has seen."""
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
        """Make the model of a checkpoint, or bring it up to date, and tag which of the others are still on the disk.

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

    def look(self) -> None:
        """Tag which checkpoints are on the disk, now that none is being written."""
        self._tag(self._known(self._experiment()))

    def _experiment(self) -> str:
        return self._client.get_run(self._run_id).info.experiment_id

    def _known(self, experiment: str) -> list[LoggedModel]:
        return self._client.search_logged_models(
            [experiment], filter_string=f"source_run_id = '{self._run_id}'", max_results=_MOST_LOOKED_AT
        )

    def _log(self, record: Checkpoint) -> None:
        """Show a checkpoint; all of this may have been done before, for other weights of this step."""
        from mlflow.entities import LoggedModelOutput, Metric

        client, name, experiment = self._client, f"step_{record.step:08d}", self._experiment()
        known = self._known(experiment)
        self._tag([model for model in known if model.name != name])
        model = next((model for model in known if model.name == name), None)
        tags = {"path": clean_text(record.path)}
        if (place := self._place_of(record.path)) is not None:
            tags[_ON_DISK] = "yes" if place.exists() else "no"  # it may still be written
        if model is None:
            model = client.create_logged_model(
                experiment,
                name=name,
                source_run_id=self._run_id,
                tags=tags,
                params={"step": str(record.step)},
                model_type=MODEL_TYPE,
            )
        else:
            client.set_logged_model_tags(model.model_id, tags)
        at = round(1000 * record.time)
        metrics = [
            Metric(clean_key(key), value, at, record.step, model_id=model.model_id)
            for key, value in record.metrics.items()
        ]
        client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        outputs = client.get_run(self._run_id).outputs
        if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, record.step)])  # MLflow takes it once
        client.finalize_logged_model(model.model_id, "READY")

    def _tag(self, models: list[LoggedModel]) -> None:
        for model in models:
            before, place = model.tags.get(_ON_DISK), self._place_of(model.tags.get("path", ""))
            if place is None:
                continue
            now = "yes" if place.exists() else "removed" if before in ("yes", "removed") else "no"
            if now != before:
                self._client.set_logged_model_tags(model.model_id, {_ON_DISK: now})

    def _place_of(self, path: str) -> Path | None:
        """Return where a checkpoint is or was; None where nothing can be said, as in a copy of the run without any."""
        place = self._run_dir / path
        return place if path and place.parent.is_dir() else None
