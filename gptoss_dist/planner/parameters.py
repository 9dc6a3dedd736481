"""How many parameters a model has, and the memory that a process needs to train it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptoss_dist.engine import EngineSettings, engine_kind
from gptoss_dist.engine.zero_settings import zero_stage
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.parallel.mesh import DeviceLayout


@dataclass(frozen=True)
class ParameterCount:
    """Number of weights; a tied head counts once."""

    total: int
    experts: int
    """The weights of routed experts, which are among these."""
    active: int
    """The weights that one token uses: top-k of the experts; the input embedding only if it is also the head (the
    convention of OpenAI's GPT-OSS model card)."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the exact counts, from the model built on the meta device."""
    with torch.device("meta"):
        model = GptOss(config)
    total = experts = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if ".experts." in name:
            experts += parameter.numel()
            active += parameter.numel() * config.num_experts_per_tok // config.num_local_experts
        elif "embed_tokens" not in name or config.tie_word_embeddings:
            active += parameter.numel()
    return ParameterCount(total, experts, active)


def memory_estimate(settings: EngineSettings, seq_len: int, layout: DeviceLayout) -> dict[str, float]:
    """Return bytes per process of the parts that grow with model and batch; fragmentation and buffers come on top.

    Master weights and Adam's moments are float32 and sharded, gradients and the weights that the model computes with as
    the engine says. What is offloaded to the host still counts. Activations are those that the backward pass needs,
    per token: the residual stream, norms, projections, and K rows of each expert stage (if the routing is even).
    """
    model, compute = settings.model, 2 if settings.train.precision == "bf16" else 4
    count = count_parameters(model)
    # What a process holds once everything that it computes with is gathered.
    whole = count.total - count.experts + count.experts / layout.expert_parallel
    tables = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    block = (whole - tables) / model.num_hidden_layers
    passing = 2 * block + tables  # gathered at one time, where weights are freed as soon as they have been used
    if engine_kind(settings.engine) == "deepspeed":
        stage, share = zero_stage(settings.engine), count.total / layout.shard
        # Stage 3 computes with a sharded copy, the others with a whole one.
        gathered = whole if stage < 3 else share + passing
        if stage == 1 and settings.train.precision == "bf16":
            gathered += whole  # gradients, before they are added to the float32 ones
        gradients = share if stage > 1 else whole
    else:
        gathered = passing if settings.parallel.reshard_after_forward and layout.world_size > 1 else whole
        # Between the micro-batches of a step each process keeps the gradients of all that it gathers.
        gradients = count.total / layout.shard if settings.train.gradient_accumulation == 1 else whole
    tokens = settings.train.micro_batch_size * seq_len
    D, I, K = model.hidden_size, model.intermediate_size, model.num_experts_per_tok  # noqa: E741
    q, kv = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    width = 6 * D + 3 * q + 2 * kv + K * (2 * D + 3 * I) + 4 * model.num_shared_experts * I
    every = settings.train.activation_checkpointing
    kept = model.num_hidden_layers - (model.num_hidden_layers // every if every else 0)
    recomputed = model.num_hidden_layers - kept
    return {
        "master weights, float32": 4 * count.total / layout.shard,
        "gradients, float32": 4 * gradients,
        "AdamW moments, float32": 8 * count.total / layout.shard,
        f"weights in use, {settings.train.precision}": compute * max(gathered, 0),
        "activations": compute * tokens * (width * max(kept, 1) + D * recomputed),
        "head: gradient and logits": 4 * model.vocab_size * (D + 3 * min(tokens, max(D, 512), 4096)),
    }
