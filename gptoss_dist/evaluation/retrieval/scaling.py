"""The rotary embedding that a model is evaluated with: its own, none of YaRN, or YaRN as it is asked for."""

from __future__ import annotations

import dataclasses
import re

from gptoss_dist.model.config import ModelConfig, RopeScaling

OWN, NONE, AUTO = "model", "none", "auto"
_FORM = re.compile(rf"({OWN}|{NONE})|({AUTO}|[0-9.]+)(?::([0-9.]+))?")
_CHOICES = "model, none, auto or a factor from 1 on, the last two perhaps with a beta_fast, such as 8, auto:4 or 8:4"


def check_yarn(yarn: list[str], original_length: int | None) -> None:
    """Refuse what is no rotary embedding.

    Args:
        yarn: Words as `with_yarn` takes them.
        original_length: Tokens of the context that the model was trained with.

    Raises:
        ValueError: A word is none of them, or nothing says what the context was before.
    """
    if not yarn:
        raise ValueError(f"yarn=[] says nothing; give {_CHOICES}")
    for word in yarn:
        if asks_for_yarn(word) and original_length is None:
            raise ValueError(
                f"yarn={word} needs --original-length: the tokens of the context that the model was trained with"
            )


def asks_for_yarn(word: str) -> bool:
    """Return whether a word asks for a YaRN that is not the model's own.

    Raises:
        ValueError: It is no rotary embedding.
    """
    found = _FORM.fullmatch(word)
    if not found:
        raise ValueError(f"yarn={word} must be {_CHOICES}")
    for number, least in ((found[2], 1.0), (found[3], RopeScaling.beta_slow)):
        if number in (None, AUTO):
            continue
        if number.count(".") > 1 or number == "." or not least <= float(number) <= 1e6:
            raise ValueError(f"yarn={word} must be {_CHOICES}; numbers are from {least:g} on")
    return found[1] is None


def with_yarn(config: ModelConfig, word: str, length: int, original_length: int | None, spare: int) -> ModelConfig:
    """Return the configuration to evaluate a model with at one context length.

    Args:
        config: The model's own.
        word: `model` for its own rotary embedding, `none` without YaRN, a factor for YaRN with that, `auto` for YaRN
            with the factor that `length` is of `original_length`, if it is longer. `:4` behind the last two is a
            `beta_fast` of 4.
        length: Tokens of the context.
        original_length: Tokens of the context that the model was trained with; only for YaRN.
        spare: Positions beyond the context, for the answer.
    """
    scaling = config.rope_scaling
    if word == NONE:
        scaling = None
    elif asks_for_yarn(word):
        assert original_length is not None
        factor, _, beta_fast = word.partition(":")
        scaling = dataclasses.replace(
            scaling or RopeScaling(),
            factor=max(1.0, length / original_length) if factor == AUTO else float(factor),
            original_max_position_embeddings=original_length,
        )
        if beta_fast:
            scaling.beta_fast = float(beta_fast)
        if scaling.factor == 1:
            scaling = None
    # A limit is no part of the function; whether the model was made for this length is said by the caller, once.
    longest = max(config.max_position_embeddings, length + spare)
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=longest)
