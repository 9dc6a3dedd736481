"""Conversations as Harmony writes them: https://cookbook.openai.com/articles/openai-harmony."""

import pytest

from data_pipeline import Tokenizer, load_tokenizer
from data_pipeline.tokenizer.harmony import chat_template, has_harmony, stop_ids

pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
WEATHER = {"name": "get_weather", "arguments": {"place": "Bern"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Look up the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "A city."},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "window": {"type": "object", "properties": {"hours": {"type": ["number", "null"]}}},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
TOOLS_IN_WORDS = """# Tools

## functions

namespace functions {

// Look up the weather.
type get_weather = (_: {
// A city.
place: string,
unit?: "celsius" | "fahrenheit", // default: celsius
days?: number[],
window?: {
    hours?: number | null,
},
}) => any;

type now = () => any;

} // namespace functions"""


def rendered(*messages, **options) -> str:
    return render_jinja_template([list(messages)], chat_template=chat_template(), **options)[0][0]


def assistant(content="", **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([SYSTEM, USER], "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>2+2?<|end|>"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "<|start|>user<|message|>ab<|end|>",
        ),
        (
            [{"role": "developer", "content": "Be kind."}],
            "<|start|>developer<|message|># Instructions\n\nBe kind.<|end|>",
        ),
        (
            [USER, assistant("4")],
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        ),
        (
            [USER, assistant("4"), USER],
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>"
            "<|start|>user<|message|>2+2?<|end|>",
        ),
        (
            [USER, assistant("4", thinking="Even."), USER, assistant("4", reasoning_content="Again.")],
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|end|>"
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>analysis<|message|>Again.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>4<|return|>",
        ),
        (
            [USER, assistant(thinking="Look.", tool_calls=[{"type": "function", "function": WEATHER}])],
            "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>analysis<|message|>Look.<|end|>"
            "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
            '{"place": "Bern"}<|call|>',
        ),
        (
            [assistant(tool_calls=[WEATHER]), {"role": "tool", "content": "sunny"}],
            "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
            '{"place": "Bern"}<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sunny'
            "<|end|>",
        ),
    ],
    ids=["system", "parts", "developer", "answer", "turns", "thinking", "call", "result"],
)
def test_messages(messages, expected):
    assert rendered(*messages) == expected
    if messages[-1]["role"] != "assistant":
        assert rendered(*messages, add_generation_prompt=True) == expected + "<|start|>assistant"


@pytest.mark.parametrize(
    "messages, before, after",
    [
        ([USER], "<|start|>developer<|message|>", "<|end|><|start|>user<|message|>2+2?<|end|>"),
        (
            [SYSTEM, USER],
            "<|start|>system<|message|>Be brief.<|end|><|start|>developer<|message|>",
            "<|end|><|start|>user<|message|>2+2?<|end|>",
        ),
        (
            [SYSTEM, {"role": "developer", "content": "Be kind."}],
            "<|start|>system<|message|>Be brief.<|end|><|start|>developer<|message|># Instructions\n\nBe kind.\n\n",
            "<|end|>",
        ),
    ],
)
def test_tools(messages, before, after):
    assert rendered(*messages, tools=TOOLS) == before + TOOLS_IN_WORDS + after


def test_an_unknown_role_is_refused():
    with pytest.raises(Exception, match="role critic is none of system, developer, user, assistant, tool"):
        rendered({"role": "critic", "content": "x"})


def test_ids_that_end_a_text():
    tokenizer = load_tokenizer("builtin")
    special = tokenizer.special_tokens
    assert stop_ids(tokenizer) == [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]]
    plain = Tokenizer("plain", tokenizer.ranks, tokenizer.pattern, {"<|endoftext|>": 5000})
    assert stop_ids(plain) == [5000] and not has_harmony(plain)
