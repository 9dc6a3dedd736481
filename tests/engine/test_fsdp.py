"""The engine in one process, against plain torch: updates, accumulation, checkpointing, compile, skipped steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.engine.optimizer import is_decayed
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.parallel.mesh import local
from gptoss_dist.train.periodic import write_samples
from tests.support.reference import LR, SIZES, build, micro_batches, plain, settings


@pytest.fixture(scope="module")
def ranks():
    yield init_distributed()
    dist.destroy_process_group()


def train(config: Config, ranks, steps: int = 3) -> tuple[list, dict[str, torch.Tensor]]:
    engine, rows = build(config, ranks), []
    for step in range(steps):
        sums = engine.forward_backward(micro_batches(step, 2))
        result = engine.update(sums, LR)
        rows.append([float(x) for x in (result.loss, result.aux, result.z, result.grad_norm)])
    return rows, {name: local(p.detach()).clone() for name, p in engine.model.named_parameters()}


def assert_same(a, b, tolerance: float = 1e-5):
    for row, other in zip(a[0], b[0], strict=True):
        assert row == pytest.approx(other, rel=tolerance)
    for name, tensor in a[1].items():
        assert (tensor - b[1][name]).abs().max() <= 2e-4, name  # 2 % of a step: Adam amplifies rounding near zero


@pytest.mark.parametrize("tie", [False, True])
def test_equals_stock_torch(ranks, tie):
    config = settings(tie_word_embeddings=tie, num_shared_experts=int(tie))
    config.optim.clip_norm = 0.5  # active: the norm is above
    expected = plain(config, steps=3, samples=2)
    assert all(row[-1] > 0.5 for row in expected.rows)
    assert_same(train(config, ranks), (expected.rows, expected.weights))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_activation_checkpointing_recomputes_the_right_layers(ranks, every):
    config = settings()
    config.loss.router_jitter = 0.1
    torch.manual_seed(0)
    expected = train(config, ranks)
    config.train.activation_checkpointing = every
    torch.manual_seed(0)
    recomputed = train(config, ranks)
    assert expected[0] == recomputed[0]
    assert all(torch.equal(expected[1][name], recomputed[1][name]) for name in expected[1])


def test_experts_of_megablocks_and_plain_agree(ranks):
    config = settings()
    megablocks = train(config, ranks)
    config.parallel.experts = "plain"
    assert_same(train(config, ranks), megablocks)


def test_bf16_stays_close_and_keeps_float32_weights(ranks, bf16_products):
    config = settings()
    exact = train(config, ranks)
    config.train.precision = "bf16"
    rounded = train(config, ranks)
    for row, other in zip(rounded[0], exact[0]):
        assert row[0] == pytest.approx(other[0], rel=5e-3)
    assert all(p.dtype == torch.float32 for p in rounded[1].values())


@pytest.mark.slow  # test_layouts.py has it on four ranks
@pytest.mark.compiled
def test_compiled_blocks_agree(ranks):
    """A block of each kind of attention: the first is recomputed, the second is not.

    tests/engine/test_layouts.py compiles with no block and with all blocks recomputed.
    """
    config = settings(num_hidden_layers=2)
    expected = train(config, ranks, steps=2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config.train.compile, config.train.activation_checkpointing = True, 2
    assert_same(train(config, ranks, steps=2), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # not silently eager


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_grouped_mm_agrees(ranks):
    """Torch cannot trace it in float32: the graph has to break around it, as on CUDA by default."""
    config = settings(num_hidden_layers=1, num_shared_experts=1)
    config.parallel.expert_gemm = "grouped_mm"
    expected = train(config, ranks, steps=2)
    config.train.compile = True
    assert_same(train(config, ranks, steps=2), expected)


@pytest.mark.compiled
def test_replay_is_recorded_outside_of_compiled_graphs(ranks):
    config = settings(num_hidden_layers=1)
    config.train.routing = "replay"
    expected = train(config, ranks)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config.train.compile, config.train.activation_checkpointing = True, 1
    assert_same(train(config, ranks), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not [reason for reason in counters["graph_break"] if "_record" in reason]


@pytest.mark.compiled
def test_samples_compile_nothing_and_validation_little(ranks):
    config = settings(num_hidden_layers=1)
    config.train.compile = True
    config.sampling.prompts, config.sampling.max_new_tokens = ["a", "two"], 4
    tokenizer = SimpleNamespace(
        encode=lambda text: np.arange(len(text)),
        decode=str,
        decode_bytes=bytes,
        ids_without_token=lambda vocab_size: np.arange(90, vocab_size),
    )
    engine, texts = build(config, ranks), []
    report = SimpleNamespace(samples=lambda step, written: texts.append(written))
    data = SimpleNamespace(training=SimpleNamespace(mixture=SimpleNamespace(tokenizer=tokenizer)))
    run = SimpleNamespace(config=config, ranks=ranks, engine=engine, data=data, report=report)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for step in range(3):
        sums = engine.forward_backward(micro_batches(step, 2))
        engine.update(sums, LR)
        engine.evaluate(micro_batches(step, 2))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        write_samples(run, step, {})
    assert len(texts) == 3 and len(texts[0]) == 2
    assert graphs[0] > 0 and graphs == graphs[:1] * 3


def test_a_sample_that_fails_inside_a_shared_model_ends_the_run(ranks):
    config = settings(num_hidden_layers=2)
    config.sampling.prompts = ["a"]
    tokenizer = SimpleNamespace(encode=lambda text: np.arange(len(text)))
    data = SimpleNamespace(training=SimpleNamespace(mixture=SimpleNamespace(tokenizer=tokenizer)))
    several = SimpleNamespace(world_size=2, device=ranks.device)
    run = SimpleNamespace(config=config, ranks=several, data=data, engine=SimpleNamespace(model=None))
    with pytest.raises(AttributeError):
        write_samples(run, 3, {})


def test_samples_that_fail_do_not_end_a_run(ranks):
    def encode(text):
        raise UnicodeEncodeError("ascii", text, 0, 1, "ordinal not in range(128)")

    config, messages = settings(num_hidden_layers=2), []
    config.sampling.prompts = ["\u00e4"]
    tokenizer = SimpleNamespace(encode=encode)
    data = SimpleNamespace(training=SimpleNamespace(mixture=SimpleNamespace(tokenizer=tokenizer)))
    write_samples(SimpleNamespace(config=config, ranks=ranks, data=data, message=messages.append), 3, {})
    assert len(messages) == 1 and messages[0].startswith("step 3: no sample, UnicodeEncodeError: 'ascii' codec")


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("bf16_products", ["multiplied in float32", "multiplied in bf16"], indirect=True)
def test_compiled_blocks_agree_in_bf16(ranks, bf16_products):
    """Tokens in whole blocks of the attention's band, which is where its strides were once misdeclared."""
    tokens = torch.randint(0, 101, (2, 65), generator=torch.Generator().manual_seed(0))
    batch, losses = [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}], []
    for compiled in (False, True):
        config = settings(num_hidden_layers=1)
        config.train.precision, config.train.compile = "bf16", compiled
        engine = build(config, ranks)
        for _ in range(3):
            sums = engine.forward_backward(batch)
            losses.append(float(engine.update(sums, LR).loss))
    assert losses[3:] == pytest.approx(losses[:3], rel=5e-3)


def test_a_non_finite_step_leaves_no_trace(ranks):
    engine = build(settings(), ranks)
    sums = engine.forward_backward(micro_batches(0, 2))
    engine.update(sums, LR)
    good = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in engine.state().items()
    }
    weight = local(engine.model.model.norm.weight.data)
    kept, weight[3] = weight[3].item(), torch.inf
    sums = engine.forward_backward(micro_batches(1, 2))
    assert float(engine.update(sums, LR).skipped) == 1
    weight[3] = kept
    after = engine.state()
    assert all(torch.equal(local(after[name]), local(tensor)) for name, tensor in good.items())
    sums = engine.forward_backward(micro_batches(1, 2))
    assert float(engine.update(sums, LR).skipped) == 0


def test_selection_bias_follows_the_load(ranks):
    config = settings(router_selection_bias=True)
    config.loss.selection_bias_rate = 0.25
    engine = build(config, ranks)
    expected = torch.zeros(3, 4)
    for step in range(3):
        sums = engine.forward_backward(micro_batches(step, 2))
        counts_LE = engine.update(sums, LR).counts_LE
        expected += 0.25 * torch.sign(counts_LE.mean(1, keepdim=True) - counts_LE)
        state = engine.state()
        for layer, bias_E in enumerate(expected):
            assert torch.equal(state[f"model.model.layers.{layer}.mlp.router.selection_bias"], bias_E)
    assert expected.any()


def test_forced_routing_is_even_and_moves_no_bias(ranks):
    config = settings(router_selection_bias=True)
    config.loss.selection_bias_rate, config.train.routing = 0.25, "balanced"
    engine = build(config, ranks)
    sums = engine.forward_backward(micro_batches(0, 2))
    counts_LE = engine.update(sums, LR).counts_LE
    assert (counts_LE == 4 * 40 * 2 / 4).all()
    assert not engine.state()["model.model.layers.0.mlp.router.selection_bias"].any()


def test_weight_decay_acts_on_matrices_only():
    model = GptOss(ModelConfig(**SIZES, num_shared_experts=1))
    decayed = {name for name, _ in model.named_parameters() if is_decayed(name)}
    for name, _ in model.named_parameters():
        spared = any(part in name for part in ("norm", "bias", "sinks", "embed_tokens"))
        assert (name in decayed) != spared, name
    assert "lm_head.weight" in decayed and "model.layers.0.mlp.router.weight" in decayed
