"""The language of chat templates: Jinja, with what transformers gives to templates, in a sandbox.

The names and their meaning are those of `transformers/utils/chat_template_utils.py` (5.x). The published template of
GPT-OSS calls `strftime_now`; those of other models leave loops early and mark answers with `generation`.
"""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which training finds the answers; here its text passes through."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=4)  # compiling the published template takes 100 ms, and rendering it 0.1 ms
def compiled(template: str) -> jinja2.Template:
    """Return a chat template that is ready to render.

    Raises:
        jinja2.TemplateError: It is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON; unlike Jinja's own filter this one escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(text: str) -> None:
    raise jinja2.TemplateError(text)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
