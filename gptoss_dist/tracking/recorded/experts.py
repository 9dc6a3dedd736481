"""Reading how many tokens each expert got, from `expert_tokens.jsonl`, whose lines tracking/expert_tokens.py explains.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.records import Damage

logger = logging.getLogger(__name__)

EXPERT_TOKENS_FILE = "expert_tokens.jsonl"


def read_expert_tokens(run_dir: str | Path, message: Callable[[str], None] = logger.warning) -> list[dict]:
    """Return the rows of the branch that training finally took, in order of steps.

    Args:
        run_dir: Folder of the run.
        message: What is told how many lines are damaged, if any is.

    Returns:
        Rows `{"first_step": int, "step": int, "tokens": list[list[int]]}`, tokens as [L][E]. After a resume at step k
        earlier rows that reach beyond k are gone, and with a row that began before k its steps up to k: a sum cannot be
        split. Torn and damaged lines are passed over.

    Raises:
        ValueError: The folder has no such file.
    """
    path = Path(run_dir) / EXPERT_TOKENS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run with tracking.expert_tokens_every > 0")
    rows: list[dict] = []
    damage = Damage(path)
    for record, _ in read_lines(path):
        if record.get("event") == "resume" and _is_step(record.get("step")):
            rows = [row for row in rows if row["step"] <= record["step"]]
        elif _is_row(record):
            rows.append(record)
        else:
            damage.lines += 1
    damage.report(message)
    return rows


def _is_row(record: dict) -> bool:
    """Return whether a line is a row with a rectangle of counts."""
    tokens = record.get("tokens")
    if not (_is_step(record.get("first_step")) and _is_step(record.get("step")) and isinstance(tokens, list)):
        return False
    widths = {len(row) if isinstance(row, list) else 0 for row in tokens}
    return len(widths) == 1 and 0 not in widths and all(_is_step(count) for row in tokens for count in row)


def _is_step(value: object) -> bool:
    """Return whether a value is a number of steps or tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
