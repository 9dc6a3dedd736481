"""Messages as the text that a model was trained on, by its chat template, and texts with special tokens as ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipeline import Tokenizer
from data_pipeline.foreign import read_text
from data_pipeline.tokenizer.harmony import chat_template, has_harmony

TEMPLATE = "chat_template.jinja"
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a message that is to be continued. Its space shows whether a template keeps that of messages."""


def find_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Return the chat template beside a model, or else `default_template`."""
    return read_text(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else default_template(tokenizer)


def carried_template(carried: Mapping[str, bytes], tokenizer: Tokenizer) -> str | None:
    """Return the chat template among the files that a run keeps from its first weights, or else `default_template`."""
    own = carried.get(TEMPLATE)
    return own.decode(errors="replace") if own else default_template(tokenizer)


def default_template(tokenizer: Tokenizer) -> str | None:
    """Return Harmony's chat template if the tokenizer has Harmony's special tokens."""
    return chat_template() if has_harmony(tokenizer) else None


def require_template(template: str | None, tokenizer: Tokenizer, key: str) -> str:
    """Return the chat template if there is one.

    Args:
        template: From `find_template` or `carried_template`.
        tokenizer: The model's.
        key: The setting that asks for it.

    Raises:
        ValueError: There is none.
    """
    if template is None:
        raise ValueError(
            f"{key}=true needs a chat template: no {TEMPLATE} came with the model's weights, and its tokenizer "
            f"{tokenizer.name} lacks Harmony's special tokens; give --{key}=false"
        )
    return template


def render(template: str, messages: Sequence[Mapping[str, str]], *, end_of_text: str, begin_answer: bool) -> str:
    """Return messages as one text, as transformers does.

    Args:
        template: In Jinja.
        messages: Each with `role` and `content`, one at least.
        end_of_text: The special token that templates know as `eos_token`.
        begin_answer: Begin the assistant's answer behind them; else the last message is left open, to be continued.

    Raises:
        ValueError: The template refuses them, or leaves out the last message or its end, which is to be left open.
    """
    import jinja2

    from gptoss_dist.evaluation.harness.jinja_environment import compiled

    given = [dict(message) for message in messages]
    if not begin_answer:
        given[-1]["content"] += _CONTINUED
    try:
        text = compiled(template).render(
            messages=given,
            add_generation_prompt=begin_answer,
            eos_token=end_of_text,
            bos_token="",
            tools=None,
            documents=None,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text if begin_answer else _left_open(text, messages[-1]["content"])


def _left_open(text: str, last: str) -> str:
    """Return a rendered text up to the end of its last message, which is `last` with a tag behind it.

    The rules are those of `render_jinja_template(continue_final_message=True)` in transformers.
    """
    end = text.rfind(_CONTINUED.strip())
    if end < 0 or last.strip() not in text:
        raise ValueError("the chat template changes the last message, so that it cannot be continued")
    # Where the template strips messages, the space behind the tag is gone, and the message's own is too.
    return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()


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
