"""Settings of how long the processes of a run wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.command_line import ranged


@dataclass
class DistributedConfig:
    """Time limits, in seconds, and the search for slow processes. What each fault looks like is in docs/faults.md."""

    timeout: float = ranged(1800.0, above=0, below=1e6)
    """A collective, and the meeting of the processes at the start, fail after this long; RENDEZVOUS_TIMEOUT overrides
    it for the meeting. It bounds the limits below wherever a rank waits for another in a collective."""
    step_factor: float = ranged(10.0, at_least=0)
    """A step that takes more than so many times the median of the last ones is a stall: every process writes its stacks
    to the run's folder `stalls/`, and the run ends. 0 switches all limits but `timeout` off."""
    step_floor: float = ranged(300.0, above=0)
    """No step is a stall before it has taken this long, whatever the median."""
    first_step_timeout: float = ranged(1800.0, at_least=0)
    """Limit of the first step, and of steps in which something is compiled; 0 is none."""
    checkpoint_timeout: float = ranged(3600.0, at_least=0)
    """Limit of saving a checkpoint, as far as the step waits for it; 0 is none."""
    evaluation_timeout: float = ranged(3600.0, at_least=0)
    """Limit of a validation, of writing samples, and of the tasks of an evaluation; 0 is none."""
    straggler_every: int = ranged(100, at_least=0)
    """Steps between two comparisons of the processes' own times in a step, waiting excluded; 0 makes none."""
    straggler_factor: float = ranged(1.5, above=1)
    """A process that needs more than so many times the median in three comparisons in a row is named."""
