"""Prompts, settings and answers between the harness and a model: as the harness's own `hf` model has them."""

from types import SimpleNamespace

import pytest

from data_pipeline.tokenizer.harmony import chat_template
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.config import EvaluationConfig
from gptoss_dist.evaluation.harness.chat import encoder, render
from gptoss_dist.evaluation.harness.in_training import check_chat

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}, {"role": "user", "content": "{go}"}]


# Without the harness ----------------------------------------------------------------------------------------------


def test_harmony_as_a_prompt_and_back_to_special_tokens():
    tokenizer = load_tokenizer("builtin")
    text = render(chat_template(), TALK, end_of_text="<|endoftext|>", begin_answer=True)
    assert text.startswith("<|start|>user<|message|>hi<|end|>") and text.endswith("{go}<|end|><|start|>assistant")
    encode = encoder(tokenizer)
    ids = encode(text)
    special = tokenizer.special_tokens
    assert ids[0] == special["<|start|>"] and ids.count(special["<|end|>"]) == 3 and tokenizer.decode(ids) == text
    assert encode("naïve 猫") == tokenizer.encode("naïve 猫").tolist() and encode("") == []
    left_open = render(chat_template(), TALK[:2], end_of_text="", begin_answer=False)
    assert left_open.endswith("<|message|>you")
    with pytest.raises(ValueError, match="role pope is none of"):
        render(chat_template(), [{"role": "pope", "content": "x"}], end_of_text="", begin_answer=True)


# Excerpts of the published template of GPT-OSS, and what templates of other models do.
PUBLISHED = """
{%- macro system() -%}
    {{- "Knowledge cutoff: 2024-06\n" }}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "<|channel|>final" in message.content %}{{- raise_exception("tags in the content") }}{%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""
STRIPPING = """{% set mark = "a" %}{{ bos_token }}
{% for message in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {{ {"role": message.role, "b": "<é>"} | tojson(indent=1, sort_keys=true, ensure_ascii=true) }}
    {% generation %}{% set mark = "b" %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}{{ mark }}
{% endfor %}
"""
LAST = ["you", "The answer is ", "\nAnswer:\n", "return", "|", "", " ", "CONTINUE_FINAL_MESSAGE_TAG", "<|return|>"]


@pytest.mark.parametrize("template", [None, PUBLISHED, STRIPPING], ids=["harmony", "published", "stripping"])
def test_messages_are_rendered_and_left_open_as_by_transformers(template):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    template = template or chat_template()
    known = {"chat_template": template, "eos_token": "<|endoftext|>", "bos_token": ""}
    for last in LAST:
        talk = [*TALK[:1], {"role": "assistant", "content": last}]
        (expected,), _ = theirs([talk], continue_final_message=True, **known)
        assert render(template, talk, end_of_text="<|endoftext|>", begin_answer=False) == expected
        (expected,), _ = theirs([[*talk, TALK[2]]], add_generation_prompt=True, **known)
        assert render(template, [*talk, TALK[2]], end_of_text="<|endoftext|>", begin_answer=True) == expected
        assert talk[-1]["content"] == last


def test_messages_that_cannot_be_rendered_or_left_open_are_refused():
    def left_open(template, last="you"):
        talk = [*TALK[:1], {"role": "assistant", "content": last}]
        return render(template, talk, end_of_text="", begin_answer=False)

    with pytest.raises(ValueError, match="refuses the messages: tags in the content"):
        left_open(PUBLISHED, "<|channel|>final")
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content | upper }}"):
        with pytest.raises(ValueError, match="changes the last message"):
            left_open(template)
    for template in ("{% for", "{{ messages.append(1) }}", "{{ messages.__class__.__base__ }}"):
        with pytest.raises(ValueError, match="refuses the messages"):
            left_open(template)


def test_a_chat_without_a_template_is_refused_by_its_setting():
    config = EvaluationConfig(every=2, tasks=["choose"], chat=True)
    plain = SimpleNamespace(name="plain", special_tokens={"<|endoftext|>": 0})
    with pytest.raises(ValueError, match=r"^evaluation\.chat=true .* plain lacks .*; set --evaluation\.chat false$"):
        check_chat(config, plain, {})
    check_chat(config, plain, {"chat_template.jinja": b"{{ messages }}"})
    check_chat(config, load_tokenizer("bytes"), {})
    check_chat(EvaluationConfig(chat=True), plain, {})  # nothing is evaluated
