"""A compiled decoding step against the model as it is, and when it is taken."""

import functools

import pytest
import torch
from torch import nn

from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.inference import GREEDY, KVCache, Sampling, complete
from gptoss_dist.inference.compiled import FEW_COLUMNS, MANY_STEPS, CompiledDecoding, decoder_for, why_not
from gptoss_dist.inference.session import Session
from gptoss_dist.model.generate import generate
from tests.support.decoders import WINDOW, small_decoder

PROMPTS = [[5], [7, 8, 9] * 9, list(range(60, 77)), [7, 8]]


@pytest.fixture
def graphs():
    """The function that tells how many steps were compiled since the test began, and checks that each is one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def count() -> int:
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"] and not counters["recompile_limit"]
        return counters["stats"]["unique_graphs"]

    yield count
    torch._dynamo.reset()


@pytest.mark.compiled
def test_texts_are_the_same_and_one_compilation_serves_all(graphs):
    """Before the window and far behind it; of prompts of different lengths, with stops, and of several samples."""
    model = small_decoder(2)
    for prompt, new in ((WINDOW - 3, 3 * WINDOW), (3 * WINDOW, 5)):
        ids = torch.randint(0, 97, (4, prompt), generator=torch.Generator().manual_seed(prompt))
        expected = generate(model, ids, max_new_tokens=new, temperature=0)
        assert torch.equal(generate(CompiledDecoding(model), ids, max_new_tokens=new, temperature=0), expected)
    stops = [complete(model, PROMPTS, GREEDY, max_new_tokens=40)[row][0].ids[9] for row in (1, 2)]
    drawn = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    finished = []
    for prompts, sampling, options in (
        (PROMPTS, GREEDY, {"max_new_tokens": 40, "logprobs": True}),
        (PROMPTS, GREEDY, {"max_new_tokens": 60, "stop_ids": stops, "prefill_chunk": 7}),
        (PROMPTS[1:3], drawn, {"max_new_tokens": 40, "n": 2, "seeds": [1, 2, 3, 4]}),
        (PROMPTS[:1], drawn, {"max_new_tokens": 200, "n": 4, "seeds": [1, 2, 3, 4]}),
    ):
        eager, compiled = (complete(model, prompts, sampling, compile=c, **options) for c in (False, True))
        for one, other in zip([x for row in eager for x in row], [x for row in compiled for x in row]):
            assert (one.ids, one.finish) == (other.ids, other.finish)
            finished.append(one.finish)
            if one.logprobs is not None:
                torch.testing.assert_close(*map(torch.tensor, (one.logprobs, other.logprobs)), rtol=1e-4, atol=1e-4)
    assert graphs() == 1 and "stop" in finished[4:8]


@pytest.mark.slow
@pytest.mark.compiled
@torch.no_grad()
def test_in_bf16_it_rounds_no_worse_than_the_model(graphs):
    model, logits = small_decoder(2).bfloat16(), []
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    for decoder in (model, CompiledDecoding(model), None):
        cache = KVCache(model.config, capacity=64, fixed_shapes=isinstance(decoder, CompiledDecoding))
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        steps = [(decoder or model.float())(part, cache=cache, last_only=True) for part in parts]
        logits.append(torch.cat(steps, dim=1).float())
    eager, compiled, exact = logits
    assert graphs() == 1 and 0 < (compiled - exact).abs().max() < 1.3 * (eager - exact).abs().max() < 0.5


def test_auto_compiles_where_so_much_is_written_that_it_pays(monkeypatch):
    model = small_decoder(2)
    options = {"columns": FEW_COLUMNS}
    for steps, columns, expected in (
        (MANY_STEPS, FEW_COLUMNS, True),
        (MANY_STEPS - 1, FEW_COLUMNS, False),
        (MANY_STEPS, FEW_COLUMNS + 1, False),
    ):
        assert (decoder_for(model, "auto", steps=steps, columns=columns) is not model) == expected
    assert decoder_for(model, False, steps=10**9, columns=1) is model
    assert isinstance(decoder_for(model, True, steps=1, columns=10**6), CompiledDecoding)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert decoder_for(model, "auto", steps=MANY_STEPS, **options) is model
    with pytest.raises(ValueError, match=r"^compile=True needs a compiler, and there is no g\+\+"):
        decoder_for(model, True, steps=1, **options)


def hooked(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def checkpointed(model: nn.Module) -> None:
    model.model.layers[0].forward = functools.partial(model.model.layers[0].forward)


def partitioned(model: nn.Module) -> None:
    model.lm_head.weight.ds_id = 1


@pytest.mark.parametrize("wrap", [hooked, checkpointed, partitioned])
def test_a_model_that_others_have_wrapped_is_never_compiled(wrap):
    """As FSDP2, activation checkpointing and ZeRO 3 do; and one that ranks share, whatever it looks like."""
    model = small_decoder(2)
    assert why_not(model) is None and why_not(model, is_shared=True)
    wrap(model)
    assert decoder_for(model, "auto", steps=MANY_STEPS, columns=1) is model
    with pytest.raises(ValueError, match="compile=True needs a model of which this process holds all weights"):
        complete(model, [[1]], GREEDY, max_new_tokens=2, compile=True)


def test_auto_goes_on_without_a_compiler_that_fails(monkeypatch, caplog):
    def fail(graph, inputs):
        raise OSError("no assembler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    monkeypatch.setattr("gptoss_dist.inference.compiled.MANY_STEPS", 20)
    torch._dynamo.reset()
    model = small_decoder(1)
    caplog.set_level("WARNING")
    found = complete(model, PROMPTS, GREEDY, max_new_tokens=20)
    assert caplog.text.count("could not be compiled, and runs as it is") == 1 and "no assembler" in caplog.text
    assert found == complete(model, PROMPTS, GREEDY, max_new_tokens=20, compile=False)
    with pytest.raises(Exception, match="no assembler"):
        complete(model, PROMPTS, GREEDY, max_new_tokens=20, compile=True)
    torch._dynamo.reset()


def test_a_session_counts_what_it_writes(monkeypatch):
    """By batch size and room, each of which would be compiled anew."""
    asked = []

    def decoder(model, compile, *, steps, columns, is_shared):
        asked.append((compile, steps))
        return model

    monkeypatch.setattr("gptoss_dist.inference.generation.decoder_for", decoder)
    session = Session(small_decoder(1), load_tokenizer("bytes"))
    session.model.config.vocab_size = 97
    for prompts, options in ((["A"], {}), (["B"], {}), (["A", "B"], {}), (["A"], {"max_new_tokens": 300}), (["C"], {})):
        session.samples(prompts, **{"max_new_tokens": 20, "compile": "auto"} | options)
    assert asked == [("auto", steps) for steps in (20, 40, 20, 300, 60)]


@pytest.mark.parametrize("padding", [None, (0, 4, 2)])
@torch.no_grad()
def test_a_cache_of_fixed_shapes_is_a_cache(padding):
    """What is compiled, step by step and uncompiled: the masks hide what was never written, and padding."""
    model, logits = small_decoder(2), []
    ids = torch.randint(0, 97, (3, 4 * WINDOW), generator=torch.Generator().manual_seed(0))
    for fixed_shapes in (False, True):
        cache = KVCache(model.config, capacity=64, padding=padding, fixed_shapes=fixed_shapes)
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        logits.append(torch.cat([model(part, cache=cache, last_only=True) for part in parts], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
