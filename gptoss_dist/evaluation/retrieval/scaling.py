"""The rotary embedding that a model is evaluated with: its own, none of YaRN, or YaRN as it is asked for."""

from __future__ import annotations

import dataclasses

from gptoss_dist.model.config import ModelConfig, RopeScaling

OWN, NONE, AUTO = "model", "none", "auto"


def check_yarn(yarn: list[str], original_length: int | None) -> None:
    """Refuse a YaRN that is none of `model`, `none`, `auto` or a number from 1 on.

    Raises:
        ValueError: It is none of them, or nothing says what the context was before.
    """
    if not yarn:
        raise ValueError("yarn=[] says nothing; give model, none, auto or a factor")
    for word in yarn:
        if word in (OWN, NONE, AUTO):
            continue
        try:
            factor = float(word)
        except ValueError:
            factor = 0.0
        if not 1 <= factor < 1e6:
            raise ValueError(f"yarn={word} must be model, none, auto or a factor from 1 on, such as 8")
    asked = [word for word in yarn if word not in (OWN, NONE)]
    if asked and original_length is None:
        raise ValueError(
            f"yarn={asked[0]} needs --original-length: the tokens of the context that the model was trained with"
        )


def with_yarn(config: ModelConfig, yarn: str, length: int, original_length: int | None, spare: int) -> ModelConfig:
    """Return the configuration to evaluate a model with at one context length.

    Args:
        config: The model's own.
        yarn: `model` for its own rotary embedding, `none` without YaRN, a factor for YaRN with that, `auto` for YaRN
            with the factor that `length` is of `original_length`, if it is longer.
        length: Tokens of the context.
        original_length: Tokens of the context that the model was trained with; only for YaRN.
        spare: Positions beyond the context, for the answer.
    """
    scaling = config.rope_scaling
    if yarn != OWN:
        factor = (
            1.0 if yarn == NONE else max(1.0, length / (original_length or length)) if yarn == AUTO else float(yarn)
        )
        scaling = None
        if factor > 1:
            scaling = dataclasses.replace(
                config.rope_scaling or RopeScaling(),
                factor=factor,
                original_max_position_embeddings=original_length,
            )
    # A limit is no part of the function; whether the model was made for this length is said by the caller, once.
    longest = max(config.max_position_embeddings, length + spare)
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=longest)
