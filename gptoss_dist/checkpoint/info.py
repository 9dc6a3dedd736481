"""What a checkpoint says of the run that wrote it, beside tensors and random states.

It stands in `checkpoint.json`, with the number of its format (`store.FORMAT`), the files and their hashes. Fields that
were added since a checkpoint was written have their defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss_dist.checkpoint.store import read_info


@dataclass(frozen=True)
class CheckpointInfo:
    """The state of a run that is not in its tensors; all values are JSON's."""

    step: int
    """Optimizer steps done."""
    samples_consumed: int
    """Positions of the data order that were trained on: the only state of the data."""
    skipped_steps: int = 0
    """Steps in all whose update was skipped because loss or gradient was not finite."""
    validation_loss: float | None = None
    """Mean token loss in nats, if there was a validation right before the save."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's settings, as `Config.to_dict` has them."""
    data: dict[str, Any] = field(default_factory=dict)
    """Place in the data, as `TrainingData.place` has it, and the former `path`."""
    tokens: int | None = None
    """Tokens trained on; None in checkpoints from before they were counted."""
    mlflow_run_id: str | None = None
    code: str | None = None
    """Revision of the code that wrote it."""
    layout: str | None = None
    """Engine and layout, for people."""

    @classmethod
    def read(cls, checkpoint: str | Path) -> CheckpointInfo:
        """Read the info of a checkpoint.

        Raises:
            ValueError: it is not a checkpoint, of another format, or not what was written.
        """
        stored = read_info(checkpoint)
        return cls(**{f.name: stored[f.name] for f in dataclasses.fields(cls) if f.name in stored})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values by name."""
        return dataclasses.asdict(self)
