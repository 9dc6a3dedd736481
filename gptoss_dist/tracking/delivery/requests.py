"""Requests about one run, parts of which a server may refuse.

Servers differ in what they take: an older one has shorter values, a proxy smaller requests. One refused value must not
cost the hundred others of its request, nor what comes after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

# Limits of MLflow's REST API and SQL store.
_KEYS_PER_REQUEST = 100
_MAX_KEY, _MAX_VALUE = 250, 5000
_SHORTER = (500, 250)
"""Characters of values that earlier versions of MLflow took."""
_NAMED = 5
"""Refused values that a message names."""

NOTE_TAG = "mlflow.note.content"
OWN_TEXT = "*What you write below this line stays.*"
"""Ends the part of a run's note that is written anew."""

Item = TypeVar("Item")


class RunGone(Exception):
    """The run was deleted, or its experiment was."""


class Requests:
    """Requests about one run, in as few calls as the server lets pass.

    Args:
        client: An MlflowClient.
        run_id: The run.
        message: What tells the user.
    """

    def __init__(self, client: Any, run_id: str, message: Callable[[str], None]) -> None:
        self._client, self._run_id, self._message = client, run_id, message

    def run(self) -> Run:
        """Return the run.

        Raises:
            RunGone: It is deleted.
        """
        run = self._client.get_run(self._run_id)
        if run.info.lifecycle_stage != "active":
            raise RunGone(f"MLflow's run {self._run_id} is deleted")
        return run

    def log_metrics(self, metrics: list[Metric]) -> None:
        """Send finite values of metrics."""
        refused = self._send(metrics, lambda part: self._client.log_batch(self._run_id, metrics=part, synchronous=True))
        self._report("left out", "metrics", [metric.key for metric, _ in refused], refused)

    def log_params(self, params: dict[str, str]) -> None:
        """Set parameters that the run does not have yet."""
        from mlflow.entities import Param

        self._set(
            "parameters",
            params,
            lambda part: self._client.log_batch(self._run_id, params=[Param(*item) for item in part], synchronous=True),
        )

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set properties."""
        from mlflow.entities import RunTag

        self._set(
            "tags",
            tags,
            lambda part: self._client.log_batch(self._run_id, tags=[RunTag(*item) for item in part], synchronous=True),
        )

    def optional(self, what: str, request: Callable[[], object]) -> None:
        """Make a request that a server may refuse, or not know, without loss of anything else."""
        try:
            request()
        except Exception as error:
            if not (is_refusal(error) or _code(error) in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")):
                raise
            self.run()
            self._message(f"MLflow refuses {what}: {one_line(error)}")

    def _set(self, what: str, values: dict[str, str], send: Callable[[Sequence[tuple[str, str]]], object]) -> None:
        items = [(clean_key(key), clean_text(value)) for key, value in values.items()]
        refused = []
        for i in range(0, len(items), _KEYS_PER_REQUEST):
            refused += self._send(items[i : i + _KEYS_PER_REQUEST], send)
        cut: list[str] = []
        left_out: list[str] = []
        for (key, value), _ in refused:
            shorter = ((key, value[:limit]) for limit in _SHORTER if len(value) > limit)
            # `any` stops at the first that is taken.
            (cut if any(not self._send([item], send) for item in shorter) else left_out).append(key)
        self._report("cut", what, cut, refused)
        self._report("left out", what, left_out, refused)

    def _send(self, items: Sequence[Item], send: Callable[[Sequence[Item]], object]) -> list[tuple[Item, Exception]]:
        """Send items together, or by halves where that is refused; return those that are refused on their own.

        Raises:
            RunGone: All would be refused.
        """
        if not items:
            return []
        try:
            send(items)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(items) == 1:
                self.run()
                return [(items[0], error)]
            half = len(items) // 2
            return self._send(items[:half], send) + self._send(items[half:], send)
        return []

    def _report(self, done: str, what: str, keys: list[str], refused: Sequence[tuple[Any, Exception]]) -> None:
        if keys:
            named = ", ".join(dict.fromkeys(keys[:_NAMED])) + (", ..." if len(keys) > _NAMED else "")
            reason = one_line(refused[0][1])
            self._message(f"MLflow refuses {len(keys)} {what}, which are {done} ({named}): {reason}")


def is_refusal(error: Exception) -> bool:
    """Return whether the server is well and does not take what was sent; sending it again would not help."""
    return _code(error) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST") or "failed with error code 413" in str(error)


def is_unknown(error: Exception) -> bool:
    """Return whether the server does not have what was asked for by an id; some take no id of another form."""
    return _code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def clean_key(key: str) -> str:
    """Return a name that MLflow takes for a metric, parameter or tag.

    One bad name would make it refuse the whole request.
    """
    return re.sub(r"[^\w\-. :/]", "_", key)[:_MAX_KEY]


def clean_text(text: str, limit: int = _MAX_VALUE) -> str:
    """Return a text that every store can hold: without lone surrogates and zero bytes, and not too long."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")[:limit]


def is_same(value: str, kept: str) -> bool:
    """Return whether a server keeps `kept` for `value`, which it may have taken only when it was cut."""
    return value == kept or (len(kept) in _SHORTER and value.startswith(kept))


def with_own_text(note: str, kept: str | None) -> str:
    """Return a run's new note with what people wrote into the one that MLflow has: below its last line, or all of it.

    Where both are too long, the new note is cut, and not written at all rather than a word of theirs. A new note may
    bring such words of its own, below the same line: they count until people have written there.
    """
    note, _, given = note.partition(OWN_TEXT)
    note, kept = note.rstrip(), kept or ""
    if len(kept) in _SHORTER and OWN_TEXT not in kept and kept.startswith(note.split("\n", 1)[0][: len(kept)]):
        kept = ""  # one of ours, which an earlier version of MLflow has cut
    own = kept.rpartition(OWN_TEXT)[2].strip() or given.strip()
    room = _MAX_VALUE - len(own) - len(OWN_TEXT) - 5
    if room < 0:
        return kept or own
    return f"{note[:room]}\n\n{OWN_TEXT}\n" + (f"\n{own}\n" if own else "")


def one_line(error: BaseException) -> str:
    """Return what an error says, short enough for a line, without passwords."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return without_secrets(text)[:300]


def _code(error: Exception) -> str | None:
    """Return MLflow's code for an error; None for errors that are not its own."""
    return getattr(error, "error_code", None)
