"""Throughput that others published, with the layout and the hardware, to compare the planner's predictions with.

All runs are in bf16, on synthetic or real tokens of full length, without tensor, pipeline or context parallelism. The
architecture is written as this project's model: a dense network is one expert that every token visits. `differs` says
what that cannot express, `assumed` what the source does not state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gptoss_dist.model.config import FULL, ModelConfig


@dataclass(frozen=True)
class PublishedRun:
    """One row of a published table."""

    name: str
    source: str
    """Repository, commit, file and row."""
    date: str
    """Month of the measurement, or of its publication."""
    model: ModelConfig
    parameters: float
    """Weights, as the source or the model's own page counts them."""
    gpu: str
    """A name of `hardware.find_gpu`."""
    gpus: int
    gpus_per_node: int
    network: str
    """A name of `hardware.find_network`; without meaning within one node."""
    shard: int
    """GPUs among which the weights and the optimizer state are sharded; the rest are replicas."""
    micro_batch: int
    """Samples per GPU and forward pass."""
    accumulation: int
    """Forward and backward passes per step."""
    seq_len: int
    global_batch: int
    """Samples per step, as published."""
    tokens_per_s_per_gpu: float
    """As published, whatever the rounding."""
    engine: Literal["fsdp", "zero1"] = "fsdp"
    """`fsdp` shards weights, gradients and optimizer state, `zero1` the optimizer state only."""
    expert_parallel: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: `full` of every block, `selective` of its cheaper parts."""
    recomputes_products: bool = False
    """Whether selective checkpointing computes every second product again."""
    compiled: bool = False
    fused_kernels: bool = False
    """Whether the program has kernels of its own that fuse norms and activations."""
    deduplicated: bool = False
    """Whether a token is sent once to each GPU and node that has experts of it (DeepEP), not once per expert."""
    balanced: bool = True
    """Every expert gets the same number of tokens; without meaning for dense models."""
    differs: str = ""
    assumed: str = ""

    @property
    def replicate(self) -> int:
        """Copies of the sharded weights."""
        return self.gpus // self.shard

    @property
    def fused(self) -> bool:
        """Whether elementwise operators are fused, by torch.compile or by hand."""
        return self.compiled or self.fused_kernels

    @property
    def step_s(self) -> float:
        """Seconds per optimizer step."""
        return self.global_batch * self.seq_len / (self.tokens_per_s_per_gpu * self.gpus)


def _gpt_oss(layers: int, experts: int) -> ModelConfig:
    return ModelConfig(num_hidden_layers=layers, num_local_experts=experts)


def _plain(**fields: Any) -> ModelConfig:
    """Return a model without what only GPT-OSS has: biases, sliding windows, the clamped activation, YaRN."""
    return ModelConfig(
        layer_types=[FULL] * fields["num_hidden_layers"],
        head_dim=128,
        rope_scaling=None,
        attention_bias=False,
        router_bias=False,
        expert_bias=False,
        expert_activation="silu",
        sink_init="zero",
        **fields,
    )


def _dense(hidden: int, intermediate: int, layers: int, kv_heads: int, vocab: int, tied: bool = False) -> ModelConfig:
    return _plain(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv_heads,
        num_local_experts=1,
        num_experts_per_tok=1,
        tie_word_embeddings=tied,
    )


def _qwen3_30b() -> ModelConfig:
    return _plain(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_local_experts=128,
        num_experts_per_tok=8,
    )


def _llama_8b() -> ModelConfig:
    return _dense(4096, 14336, 32, 8, 128256)


def _mpt(hidden: int, intermediate: int, layers: int) -> ModelConfig:
    # Two matrices of 4 x hidden have the weights and the FLOPs of three of 8/3 x hidden, here a multiple of 16.
    return _dense(hidden, intermediate, layers, hidden // 128, 50368, tied=True)


_AUTOMODEL = "github.com/NVIDIA-NeMo/Automodel"
_AUTOMODEL_TABLE = f"{_AUTOMODEL} 36044ad docs/performance-summary.mdx, DGX-H100 BF16"
_AUTOMODEL_DIFFERS = (
    "Transformer Engine's products and norms; DeepEP, which sends a token once to each GPU and node that needs it, "
    "where an all-to-all sends it once per expert; no gradient clipping; routing forced to be even"
)
_AUTOMODEL_ASSUMED = "the network, 400 Gbit/s per GPU as in DGX H100; the type of weights and optimizer state"
_EXCHANGES = f"{_AUTOMODEL} 60dfabf docs/deepep_vs_hybridep_benchmark.md"
_TITAN = "github.com/pytorch/torchtitan b5bcd76 benchmarks/llama3_h100_202412_torchtitan.md"
_TITAN_DIFFERS = (
    "H100 of 96 GB HBM2e at 2.4 TB/s and 500 W, between the SXM and the NVL card; selective checkpointing by operator, "
    "which keeps every second product; dense"
)
_FOUNDRY = "github.com/mosaicml/llm-foundry 8c8dd48 scripts/train/benchmarking/README.md"
_FOUNDRY_DIFFERS = (
    "MPT: GELU with two matrices, learned positions or ALiBi, LayerNorm in bf16; torch 2.1 with FSDP1, FlashAttention-2"
)
_KEMPNER = "github.com/KempnerInstitute/KempnerForge 5666d0d benchmarks/mfu_scaling/mfu_scaling.md"

PUBLISHED = (
    PublishedRun(
        name="gpt-oss-20b, 8 H100",
        source=f"{_AUTOMODEL_TABLE}: GPT-OSS 20B | 8 | 256 | 2 | 2 | 16 | 4096 | EP - | FSDP 8 | Transformer"
        " Engine + DeepEP + FlexAttn | 10.04 s | 279 | 13,058; EP 8, no checkpointing: 037e04a"
        " examples/benchmark/configs/gptoss_20b_te_deepep.yaml",
        date="2025-10",
        model=_gpt_oss(24, 32),
        parameters=20.9e9,
        gpu="h100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="ib-400",
        shard=8,
        expert_parallel=8,
        micro_batch=2,
        accumulation=16,
        seq_len=4096,
        global_batch=256,
        tokens_per_s_per_gpu=13058,
        fused_kernels=True,
        deduplicated=True,
        differs=f"FlexAttention; {_AUTOMODEL_DIFFERS}",
        assumed=_AUTOMODEL_ASSUMED,
    ),
    PublishedRun(
        name="gpt-oss-120b, 64 H100",
        source=f"{_AUTOMODEL_TABLE}: GPT-OSS 120B | 64 | 512 | 2 | 2 | 4 | 4096 | EP - | FSDP 64 | Transformer"
        " Engine + DeepEP + FlexAttn | 4.30 s | 231 | 7,626; EP 64, no checkpointing, weights freed after"
        " forward: 037e04a examples/benchmark/configs/gptoss_120b_te_deepep.yaml",
        date="2025-10",
        model=_gpt_oss(36, 128),
        parameters=116.8e9,
        gpu="h100-80gb",
        gpus=64,
        gpus_per_node=8,
        network="ib-400",
        shard=64,
        expert_parallel=64,
        micro_batch=2,
        accumulation=4,
        seq_len=4096,
        global_batch=512,
        tokens_per_s_per_gpu=7626,
        fused_kernels=True,
        deduplicated=True,
        differs=f"FlexAttention; {_AUTOMODEL_DIFFERS}",
        assumed=_AUTOMODEL_ASSUMED,
    ),
    PublishedRun(
        name="qwen3-30b-a3b, 8 H100",
        source=f"{_AUTOMODEL_TABLE}: Qwen3 MoE 30B | 8 | 512 | 4 | 4 | 16 | 4096 | EP 8 | FSDP 8 | Transformer"
        " Engine + DeepEP | 21.773 s | 277 | 12,040; checkpointing: 092af93"
        " examples/benchmark/configs/qwen3_moe_30b_te_deepep.yaml",
        date="2025-10",
        model=_qwen3_30b(),
        parameters=30.5e9,
        gpu="h100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="ib-400",
        shard=8,
        expert_parallel=8,
        micro_batch=4,
        accumulation=16,
        seq_len=4096,
        global_batch=512,
        tokens_per_s_per_gpu=12040,
        recompute="full",
        fused_kernels=True,
        deduplicated=True,
        differs=f"Transformer Engine's attention, norms of queries and keys; {_AUTOMODEL_DIFFERS}",
        assumed=_AUTOMODEL_ASSUMED,
    ),
    PublishedRun(
        name="qwen3-30b-a3b, 16 H100",
        source=f"{_EXCHANGES}, 4.2, EP16, GBS 256, LBS 2: deepep | 5.906 s | 177,531 / 11,096; CX7 400 Gbit/s",
        date="2026-07",
        model=_qwen3_30b(),
        parameters=30.5e9,
        gpu="h100-80gb",
        gpus=16,
        gpus_per_node=8,
        network="ib-400",
        shard=16,
        expert_parallel=16,
        micro_batch=2,
        accumulation=8,
        seq_len=4096,
        global_batch=256,
        tokens_per_s_per_gpu=11096,
        recompute="full",
        fused_kernels=True,
        deduplicated=True,
        differs=f"Transformer Engine's attention, norms of queries and keys; {_AUTOMODEL_DIFFERS}",
        assumed="the type of weights and optimizer state; one port per GPU (the text says per GPU pair)",
    ),
    PublishedRun(
        name="llama-3.1-8b, 8 H100, eager",
        source=f"{_TITAN}, table 1: FSDP | 5,762 | 82.4; local batch size 2, global 16; 9dec370 llama3_8b.toml: 8192",
        date="2024-12",
        model=_llama_8b(),
        parameters=8.03e9,
        gpu="h100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="roce-400",
        shard=8,
        micro_batch=2,
        accumulation=1,
        seq_len=8192,
        global_batch=16,
        tokens_per_s_per_gpu=5762,
        recompute="selective",
        recomputes_products=True,
        differs=_TITAN_DIFFERS,
    ),
    PublishedRun(
        name="llama-3.1-8b, 8 H100, compiled",
        source=f"{_TITAN}, table 1: FSDP + torch.compile | 6,667 | 77.0; otherwise as the eager run",
        date="2024-12",
        model=_llama_8b(),
        parameters=8.03e9,
        gpu="h100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="roce-400",
        shard=8,
        micro_batch=2,
        accumulation=1,
        seq_len=8192,
        global_batch=16,
        tokens_per_s_per_gpu=6667,
        recompute="selective",
        recomputes_products=True,
        compiled=True,
        differs=_TITAN_DIFFERS,
    ),
    PublishedRun(
        name="llama-3.1-8b, 128 H100, compiled",
        source=f"{_TITAN}, table 3: FSDP + torch.compile | 6,514 | 62.0; local batch size 2, global 256; 400 Gbit/s",
        date="2024-12",
        model=_llama_8b(),
        parameters=8.03e9,
        gpu="h100-80gb",
        gpus=128,
        gpus_per_node=8,
        network="roce-400",
        shard=128,
        micro_batch=2,
        accumulation=1,
        seq_len=8192,
        global_batch=256,
        tokens_per_s_per_gpu=6514,
        recompute="selective",
        recomputes_products=True,
        compiled=True,
        differs=_TITAN_DIFFERS,
    ),
    PublishedRun(
        name="llama-3-8b, 4 H200, compiled",
        source=f"{_KEMPNER}: 4 | 4 | 1 | 7B | FSDP=4 | 38,983 (all four) | 53.8 | 61.1 GB | 3.36 s; the command in"
        " mfu_bench.sh: batch_size=4, grad_accum_steps=2, activation_checkpointing=full, compile_model=true",
        date="2026-04",
        model=_llama_8b(),
        parameters=8.03e9,
        gpu="h200-141gb",
        gpus=4,
        gpus_per_node=4,
        network="ib-400",
        shard=4,
        micro_batch=4,
        accumulation=2,
        seq_len=4096,
        global_batch=32,
        tokens_per_s_per_gpu=38983 / 4,
        recompute="full",
        compiled=True,
        differs="dense",
    ),
    PublishedRun(
        name="mpt-7b, 8 H100",
        source=f"{_FOUNDRY}, H100 80GB: 7b | 2048 | 8 | 46.44 | 6 | 1 | 48 | 10643 | amp_bf16 | FULL_SHARD | False",
        date="2024-01",
        model=_mpt(4096, 10928, 32),
        parameters=6658859008,
        gpu="h100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="ib-400",
        shard=8,
        micro_batch=6,
        accumulation=1,
        seq_len=2048,
        global_batch=48,
        tokens_per_s_per_gpu=10643,
        differs=f"{_FOUNDRY_DIFFERS}; dense",
    ),
    PublishedRun(
        name="mpt-7b, 8 A100",
        source=f"{_FOUNDRY}, A100 80GB: 7b | 2048 | 8 | 64.23 | 6 | 2 | 96 | 4641 | amp_bf16 | FULL_SHARD | False",
        date="2024-01",
        model=_mpt(4096, 10928, 32),
        parameters=6658859008,
        gpu="a100-80gb",
        gpus=8,
        gpus_per_node=8,
        network="roce-200",
        shard=8,
        micro_batch=6,
        accumulation=2,
        seq_len=2048,
        global_batch=96,
        tokens_per_s_per_gpu=4641,
        differs=f"{_FOUNDRY_DIFFERS}; dense",
    ),
    PublishedRun(
        name="mpt-13b, 64 A100-40GB",
        source=f"{_FOUNDRY}, A100 40GB with 1600 Gbps: 13b | 2048 | 64 | 52.04 | 16 | 1 | 1024 | 1976 | bf16 | PURE |"
        " FULL_SHARD | True",
        date="2024-01",
        model=_mpt(5120, 13648, 40),
        parameters=12853954560,
        gpu="a100-40gb",
        gpus=64,
        gpus_per_node=8,
        network="roce-200",
        shard=64,
        micro_batch=16,
        accumulation=1,
        seq_len=2048,
        global_batch=1024,
        tokens_per_s_per_gpu=1976,
        recompute="full",
        differs=f"{_FOUNDRY_DIFFERS}; gradients are reduced in bf16; dense",
    ),
    PublishedRun(
        name="gpt-oss-120b, 64 B200, DDP",
        source="github.com/NVIDIA-NeMo/Megatron-Bridge 067f987 docs/performance-summary-archive.md, 26.02.01: DGX-B200"
        " | 64 | BF16 | 1280 | 4 | 4096 | FSDP 0 | TP 1 | PP 1 | CP 1 | EP 8 | 13722 | 373; recompute of layernorm and"
        " moe_act: src/megatron/bridge/perf_recipes/gpt_oss/b200/gpt_oss.py",
        date="2026-03",
        model=_gpt_oss(36, 128),
        parameters=116.8e9,
        gpu="b200-192gb",
        gpus=64,
        gpus_per_node=8,
        network="ib-400",
        shard=64,
        engine="zero1",
        expert_parallel=8,
        micro_batch=4,
        accumulation=5,
        seq_len=4096,
        global_batch=1280,
        tokens_per_s_per_gpu=13722,
        recompute="selective",
        fused_kernels=True,
        differs="Megatron-Core: cuDNN's attention, fused kernels; weights whole but for the experts; even routing",
        assumed="the network, 400 Gbit/s per GPU as in DGX B200; a distributed optimizer",
    ),
)
"""The runs that the table in docs/planning_time.md compares with, best documented first."""
