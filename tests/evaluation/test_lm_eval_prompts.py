"""Prompts, settings and answers between the harness and a model: as the harness's own `hf` model has them."""

import re
from types import SimpleNamespace

import pytest

from data_pipeline.tokenizer.harmony import chat_template
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.config import EvaluationConfig
from gptoss_dist.evaluation.harness import tasks
from gptoss_dist.evaluation.harness.chat import encoder, render
from gptoss_dist.evaluation.harness.in_training import check_chat
from gptoss_dist.evaluation.scoring import Score
from tests.support.harness_tasks import write_tasks

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}, {"role": "user", "content": "{go}"}]


@pytest.fixture
def needs_harness():
    pytest.importorskip("lm_eval", reason="needs sh launch/install.sh --extras test,eval")
    pytest.importorskip("transformers")


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
    with pytest.raises(ValueError, match=r"^evaluation\.chat=true .* plain lacks .*; give --evaluation\.chat=false$"):
        check_chat(config, plain, {})
    check_chat(config, plain, {"chat_template.jinja": b"{{ messages }}"})
    check_chat(config, load_tokenizer("bytes"), {})
    check_chat(EvaluationConfig(chat=True), plain, {})  # nothing is evaluated


# With it ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"top_k": None, "temperature": None, "top_p": None, "repetition_penalty": None, "num_beams": None},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "num_beams": 1},
        {"do_sample": False, "top_k": 3, "repetition_penalty": 1.2},
    ],
)
def test_texts_are_written_as_transformers_would(needs_harness, given):
    """By the settings that `generate` of transformers takes in the end."""
    from transformers import GenerationConfig, GenerationMixin

    from gptoss_dist.evaluation.harness.generation_kwargs import read

    class Model(GenerationMixin):
        generation_config = GenerationConfig()
        config = SimpleNamespace(_get_generation_parameters=dict)

    theirs, _ = Model()._prepare_generation_config(None, **({"do_sample": True} | given))
    found = read({"do_sample": True, "until": "x"} | given, "write")
    sampling = found.sampling
    assert found.stops == ("x",) and found.max_new_tokens == 256
    assert sampling.repetition_penalty == (theirs.repetition_penalty or 1.0)
    if theirs.do_sample:
        assert (sampling.temperature, sampling.top_p) == (theirs.temperature or 1.0, theirs.top_p or 1.0)
        assert (sampling.top_k, sampling.min_p) == (theirs.top_k or 0, theirs.min_p or 0.0)
    else:
        assert sampling.temperature == 0.0


def test_what_a_task_cannot_have_written_is_refused_by_name(needs_harness, tmp_path):
    from gptoss_dist.evaluation.harness.generation_kwargs import read

    for given, words in (
        ({"num_beams": 4}, "num_beams=4 is not supported; leave it out, or give 1"),
        ({"temperature_": 0.7}, "temperature_=0.7 is not known; did you mean temperature?; give one of until, "),
        ({"guidance": None}, "guidance=None is not known; give one of until, "),
        ({"max_length": 9}, "max_length=9 is not supported; give max_gen_toks instead"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"do_sample": True, "top_p": 2}, "top_p=2.0 must be in (0, 1]"),
        ({"do_sample": "no"}, "do_sample='no' must be true or false"),
        ({"until": [1]}, "until=[1] must be a text or a list of texts"),
        ({"max_new_tokens": 0}, "max_gen_toks=0 must be 1 or more"),
    ):
        with pytest.raises(ValueError) as refused:
            read(given, "write")
        assert str(refused.value).startswith(f"task write: generation_kwargs: {words}"), refused.value
    folder = write_tasks(tmp_path, documents=2)
    path = folder / "write.yaml"
    path.write_text(path.read_text().replace("num_beams: 1", "num_beams: 4"))
    with pytest.raises(ValueError, match="task write: generation_kwargs: num_beams=4"):
        tasks.load_tasks(tasks.find_tasks(["write"], str(folder)), ["write"], None)


def test_answers_are_scored_as_by_the_harness_or_refused_by_their_document(needs_harness):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    from gptoss_dist.evaluation.harness.language_model import HarnessModel

    class Worker:
        def score(self, requests):
            self.requests = list(requests)
            return [Score(-1.0, False)] * len(requests)

    def asked(*arguments):
        return [Instance("loglikelihood", {}, pair, 0, ("choose", 7, 1)) for pair in arguments]

    model = HarnessModel(worker := Worker(), load_tokenizer("builtin"), max_length=6)
    usual = asked(("def x", " return"), ("def x ", "return"), ("", "return"), ("", "<|endoftext|>x"), ("x " * 9, " y"))
    model.loglikelihood(usual)
    found = worker.requests
    TemplateLM.loglikelihood(model, usual, disable_tqdm=True)
    assert found == worker.requests and len(found) == 5
    for pair, words in (
        (("def x", ""), "the answer '' adds no token to its prompt, which ends in 'def x', so"),
        (("", ""), "the answer '' adds no token"),
        (("", "<|endoftext|>"), "the answer '<|endoftext|>' adds no token"),
        (("x", " x" * 9), "has 9 tokens, and the model may see max_length=6; shorten it, or leave the document out"),
    ):
        with pytest.raises(ValueError, match=f"^document 7 of task choose: .*{re.escape(words)}"):
            model.loglikelihood(asked(("def x", " return"), pair))
