"""Messages as the text that a model was trained on, by its chat template, and texts with special tokens as ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline import Tokenizer
from data_pipeline.foreign import read_text
from data_pipeline.tokenizer.harmony import chat_template, has_harmony

TEMPLATE = "chat_template.jinja"


def find_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Return the chat template beside a model, or else `default_template`."""
    return read_text(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else default_template(tokenizer)


def default_template(tokenizer: Tokenizer) -> str | None:
    """Return Harmony's chat template if the tokenizer has Harmony's special tokens."""
    return chat_template() if has_harmony(tokenizer) else None


def render(template: str, messages: Sequence[Mapping[str, str]], *, end_of_text: str, begin_answer: bool) -> str:
    """Return messages as one text, as transformers does.

    Args:
        template: In Jinja.
        messages: Each with `role` and `content`.
        end_of_text: The special token that templates know as `eos_token`.
        begin_answer: Begin the assistant's answer behind them; else the last message is left open.

    Raises:
        ValueError: The template refuses them, or changes the last message, which is to be left open.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    try:
        text = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=begin_answer, eos_token=end_of_text, bos_token="", tools=None
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    if begin_answer:
        return text
    last = messages[-1]["content"]
    found = text.rfind(last.strip())
    if found < 0:
        raise ValueError("the chat template changes the last message, so that it cannot be continued")
    return text[: found + len(last.strip())]


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return a function from text to ids for which special tokens in the text are special, as for Hugging Face's.

    `Tokenizer.encode` takes them for ordinary text, because a corpus must not be able to end its own document. The
    prompts of a harness are not a corpus.
    """
    specials = tokenizer.special_tokens
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in pattern.split(text):
            if part in specials:
                ids.append(specials[part])
            elif part:
                ids += tokenizer.encode(part).tolist()
        return ids

    return encode
