"""The `generation_kwargs` of a task, as settings by which this project writes texts. This module needs `lm_eval`.

They mean what they mean to the harness's own `hf` model, which hands them to transformers:

    {until: ["Q:"], do_sample: true, top_p: 0.9}  ->  stops "Q:", temperature 1, the 50 likeliest tokens, top_p 0.9

What this project cannot do as transformers would is refused: a result must not come from other settings than a task's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from data_pipeline.command_line.mistakes import naming, suggestion
from gptoss_dist.inference import Sampling

NEW_TOKENS = 256
"""The most that a task's text has if the task does not say, as in the harness's own models."""
TOP_K = 50
"""Where a task samples and does not say, as `GenerationConfig._get_default_generation_params` in transformers."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WHOLE = (*_LENGTHS, "top_k")
_NUMBERS = (*_WHOLE, "temperature", "top_p", "min_p", "repetition_penalty")
_KNOWN = ("until", "do_sample", *_NUMBERS)
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Settings of other models that this one has not, each with the value that changes nothing."""
_INSTEAD = {"max_length": "max_gen_toks", "stop": "until", "stop_sequences": "until", "stop_strings": "until"}
"""What else says it in every model of the harness."""


@dataclass(frozen=True)
class Generation:
    """How a task wants texts written."""

    max_new_tokens: int
    stops: tuple[str, ...]
    """Texts at which an answer is cut."""
    sampling: Sampling


def read(given: Mapping[str, Any], task: str) -> Generation:
    """Return the settings that a task's `generation_kwargs` stand for.

    A setting that is null is as one that is not there; but a `top_k` of null is no limit, as in transformers.

    Args:
        given: The task's.
        task: Its name, for errors.

    Raises:
        ValueError: A setting is unknown, out of range, or one that this project has not.
    """
    with naming(f"task {task}: generation_kwargs"):
        checked = {key: _checked(str(key), value) for key, value in given.items()}
        kwargs = dict(normalize_gen_kwargs({key: v for key, v in checked.items() if v is not None}, NEW_TOKENS))
        if kwargs["max_gen_toks"] < 1:
            raise ValueError(f"max_gen_toks={kwargs['max_gen_toks']} must be 1 or more")
        return Generation(kwargs["max_gen_toks"], tuple(kwargs["until"]), _sampling(kwargs))


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    penalty = kwargs.get("repetition_penalty", 1.0)
    if not kwargs["do_sample"]:  # transformers then follows no other setting either
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    return Sampling(
        kwargs.get("temperature", 1.0),
        kwargs.get("top_k", TOP_K),
        kwargs.get("top_p", 1.0),
        kwargs.get("min_p", 0.0),
        penalty,
    )


def _checked(key: str, value: Any) -> Any:
    """Return a setting in its type; None if it is as if it was not given.

    Raises:
        ValueError: It is unknown, or its value is not one that this project can follow.
    """
    if key in _INSTEAD:
        raise ValueError(f"{key}={value!r} is not supported; give {_INSTEAD[key]} instead")
    if key not in _KNOWN and key not in _NEUTRAL:
        close = suggestion(key, (*_KNOWN, *_NEUTRAL))
        raise ValueError(f"{key}={value!r} is not known{close}; give one of {', '.join(_KNOWN)}, or leave it out")
    if value is None:
        return 0 if key == "top_k" else None
    if key in _NUMBERS:
        return _number(key, value)
    if key in _NEUTRAL and value != _NEUTRAL[key]:
        raise ValueError(f"{key}={value!r} is not supported; leave it out, or give {_NEUTRAL[key]!r}")
    if key == "do_sample" and not isinstance(value, bool):
        raise ValueError(f"do_sample={value!r} must be true or false")
    if key == "until" and not _are_texts(value):
        raise ValueError(f"until={value!r} must be a text or a list of texts")
    return value


def _number(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (key in _WHOLE and not number.is_integer()):
        raise ValueError(f"{key}={value!r} must be a {'whole ' if key in _WHOLE else ''}number")
    return int(number) if key in _WHOLE else number


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
