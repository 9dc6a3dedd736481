"""The engine in one process, against plain torch: updates, accumulation, checkpointing, compile, skipped steps."""

import shutil

import pytest
import torch
import torch.distributed as dist

from gptoss_dist.config import Config
from gptoss_dist.engine import FsdpEngine
from gptoss_dist.engine.optimizer import is_decayed, local
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.init import initialize
from gptoss_dist.model.losses import balance_loss, z_loss
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.parallel.context import start

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
}


@pytest.fixture(scope="module")
def context():
    yield start()
    dist.destroy_process_group()


def settings(**model) -> Config:
    config = Config(model=ModelConfig(**SIZES, **model))
    config.train.precision, config.loss.z_coef = "fp32", 0.001
    return config


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches with different numbers of valid tokens."""
    tokens = torch.randint(0, 101, (4, 41), generator=torch.Generator().manual_seed(step))
    labels = tokens[:, 1:].clone()
    labels[0, :25] = -100
    return [{"input_ids": tokens[i : i + 2, :-1], "labels": labels[i : i + 2]} for i in (0, 2)]


def train(config: Config, context, steps: int = 3) -> tuple[list, dict[str, torch.Tensor]]:
    engine, rows = FsdpEngine(config, context), []
    for step in range(steps):
        engine.forward_backward(batches(step))
        result = engine.update(1e-2)
        rows.append([float(x) for x in (result.loss, result.aux, result.z, result.grad_norm)])
    return rows, {name: local(p.detach()).clone() for name, p in engine.model.named_parameters()}


def plain(config: Config, steps: int = 3) -> tuple[list, dict[str, torch.Tensor]]:
    """The same training written out with stock torch on the unsharded model."""
    model, rows = GptOss(config.model), []
    initialize(model, config.run.seed)
    groups = [[], []]
    for name, p in model.named_parameters():
        groups[is_decayed(name)].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": config.optim.weight_decay}],
        betas=tuple(config.optim.betas),
        eps=config.optim.eps,
        lr=1e-2,
    )
    for step in range(steps):
        parts = batches(step)
        valid = sum((b["labels"] != -100).sum() for b in parts)
        sums = [0.0, 0.0, 0.0]
        for b in parts:
            token_loss, stats = model(b["input_ids"], b["labels"])
            loss = token_loss / valid
            aux = balance_loss(stats, stats.counts_E, b["input_ids"].numel(), 2) / 2
            z = z_loss(stats, b["input_ids"].numel()) / 2
            (loss + config.loss.aux_coef * aux + config.loss.z_coef * z).backward()
            sums = [a + float(b) for a, b in zip(sums, (loss, aux, z))]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        rows.append([*sums, float(norm)])
    return rows, dict(model.named_parameters())


def assert_same(a, b, tolerance: float = 1e-5):
    for row, other in zip(a[0], b[0], strict=True):
        assert row == pytest.approx(other, rel=tolerance)
    for name, tensor in a[1].items():
        assert (tensor - b[1][name]).abs().max() <= 2e-4, name  # 2 % of a step: Adam amplifies rounding near zero


@pytest.mark.parametrize("tie", [False, True])
def test_equals_stock_torch(context, tie):
    config = settings(tie_word_embeddings=tie, num_shared_experts=int(tie))
    config.optim.clip_norm = 0.5  # active: the norm is above
    expected = plain(config)
    assert all(row[-1] > 0.5 for row in expected[0])
    assert_same(train(config, context), expected)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_activation_checkpointing_recomputes_the_right_layers(context, every):
    config = settings()
    config.loss.router_jitter = 0.1
    torch.manual_seed(0)
    expected = train(config, context)
    config.train.activation_checkpointing = every
    torch.manual_seed(0)
    recomputed = train(config, context)
    assert expected[0] == recomputed[0]
    assert all(torch.equal(expected[1][name], recomputed[1][name]) for name in expected[1])


def test_experts_of_megablocks_and_plain_agree(context):
    config = settings()
    megablocks = train(config, context)
    config.parallel.experts = "plain"
    assert_same(train(config, context), megablocks)


def test_bf16_stays_close_and_keeps_float32_weights(context):
    config = settings()
    exact = train(config, context)
    config.train.precision = "bf16"
    rounded = train(config, context)
    for row, other in zip(rounded[0], exact[0]):
        assert row[0] == pytest.approx(other[0], rel=5e-3)
    assert all(p.dtype == torch.float32 for p in rounded[1].values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_blocks_agree(context):
    config = settings()
    expected = train(config, context, steps=2)
    config.train.compile, config.train.activation_checkpointing = True, 2
    assert_same(train(config, context, steps=2), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_blocks_agree_in_bf16(context):
    """Tokens in whole blocks of the attention's band, which is where its strides were once misdeclared."""
    tokens = torch.randint(0, 101, (2, 65), generator=torch.Generator().manual_seed(0))
    batch, losses = [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}], []
    for compiled in (False, True):
        config = settings()
        config.train.precision, config.train.compile = "bf16", compiled
        engine = FsdpEngine(config, context)
        for _ in range(3):
            engine.forward_backward(batch)
            losses.append(float(engine.update(1e-2).loss))
    assert losses[3:] == pytest.approx(losses[:3], rel=5e-3)


def test_a_non_finite_step_leaves_no_trace(context):
    engine = FsdpEngine(settings(), context)
    engine.forward_backward(batches(0))
    engine.update(1e-2)
    good = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
            for name, tensor in engine.state().items()}  # fmt: skip
    weight = local(engine.model.model.norm.weight.data)
    kept, weight[3] = weight[3].item(), torch.inf
    engine.forward_backward(batches(1))
    assert float(engine.update(1e-2).skipped) == 1
    weight[3] = kept
    after = engine.state()
    assert all(torch.equal(local(after[name]), local(tensor)) for name, tensor in good.items())
    engine.forward_backward(batches(1))
    assert float(engine.update(1e-2).skipped) == 0


def test_weight_decay_acts_on_matrices_only():
    model = GptOss(ModelConfig(**SIZES, num_shared_experts=1))
    decayed = {name for name, _ in model.named_parameters() if is_decayed(name)}
    for name, _ in model.named_parameters():
        spared = any(part in name for part in ("norm", "bias", "sinks", "embed_tokens"))
        assert (name in decayed) != spared, name
    assert "lm_head.weight" in decayed and "model.layers.0.mlp.router.weight" in decayed
