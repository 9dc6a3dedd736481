"""The figures of GPUs and networks, with their sources, and the share of them that software reaches.

A vendor's document that was read only in another's quotation is cited with "as quoted by", one from memory with "not
read". These stand for what was read:

- ml-engineering: github.com/stas00/ml-engineering, commit 744d01e (2026-08-22), `compute/accelerator` and `network`.
- torch's messages: the "total capacity" that torch reports when such a GPU runs out of memory, from public logs.
- GTC 2025: NVIDIA's slides S72583 on NCCL, bus bandwidths of nccl-tests, as quoted by ml-engineering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Efficiency:
    """The shares of a device's rates that software reaches, and what the host costs.

    The defaults are those of Hopper. `EFFICIENCY_SOURCES` says where each comes from, for other GPUs too.
    """

    gemm: float = 0.70
    """Share of the matmul peak that large dense products reach."""
    grouped_gemm: float = 0.58
    """Share of the matmul peak that the experts' products of one layer reach."""
    attention_forward: float = 0.30
    """Share of the matmul peak of the attention kernel: two products over the visible query-key pairs, no others."""
    attention_backward: float = 0.27
    """The same of its backward pass, whose five products recompute the scores (2.5 x the forward FLOPs)."""
    memory: float = 0.85
    """Share of the memory's bandwidth that elementwise kernels and the optimizer reach."""
    link: float = 0.80
    """Share of the fast link's rate that all-gather, reduce-scatter and all-reduce reach (bus bandwidth)."""
    network: float = 0.85
    """Share of the network's rate that any collective reaches, all-to-all too."""
    all_to_all: float = 0.70
    """Share of the fast link's rate that an all-to-all within a node reaches."""
    kernel_launch_s: float = 6e-6
    """Seconds of the host per kernel: a step takes at least this times its kernels, however fast the device is."""
    host_sync_s: float = 50e-6
    """Seconds that the device idles for each operation that makes the host wait for it."""


EFFICIENCY_SOURCES = {
    "gemm": "0.95 x the best bf16 product that ml-engineering's finder measured: A100 86.9 %, B200 77.6 %, GB200 "
    "72.9 %, MI300X 51.4 % of the peak; H20 0.95 x 95 % (TileOPs, pull request 1658); Ada as the A100. Hopper, 80.3 % "
    "there, is fitted to the table in docs/planning_time.md: 0.87 x that, between 0.65 and 0.76, which fit as well",
    "grouped_gemm": "0.83 x gemm, fitted to the table in docs/planning_time.md. Block-sparse products of equal groups "
    "reach 98.6 % of cuBLAS (MegaBlocks, arXiv:2211.15841, not read); uneven and small groups reach less",
    "attention_forward": "FlashAttention-2, causal, 4096 tokens, head dimensions 64 and 128: H100 284 and 319 TFLOP/s "
    "(figure in the README of FlashAttention-3; cuDNN there 363 and 518); A100 between the rate of both passes, below, "
    "and 73 % at best (arXiv:2307.08691, as quoted). B200 and GB200: H100's TFLOP/s. RTX 4090: 142 and 151 of 165 at "
    "2048 (github.com/apache/tvm, tl_doc/flash_perf.md). MI300X, L40S: estimates. H20: twice H100's share, an estimate",
    "attention_backward": "FlashAttention-2, as above, from the rates of both passes (figures in its README): H100 257 "
    "and 294 TFLOP/s, so 248 and 285 backward; A100 156 and 173. RTX 4090: 97 and 99. Others as attention_forward",
    "memory": "the H200's calibration in TileOPs (pull request 1658 quotes 0.85, and 0.81 for an H20-3e)",
    "link": "GTC 2025, all-reduce without SHARP, 8 GPUs: A100 232 of 300, H100 370 of 450, B200 700 of 900 GB/s. "
    "8 H200: all-gather 361, reduce-scatter 363 of 450; 8 MI300X: all-reduce 313 of 448 (ml-engineering). Cards "
    "without: PCIe 6 96 of 121",
    "network": "GTC 2025, 32 H100, 8 x 400 Gbit/s a node: all-reduce 370 of 400, all-to-all 48 of 50 GB/s. Less at "
    "scale: 256 H100 gathered at 200 of 400 (github.com/NVIDIA/nccl, issue 1218); ml-engineering advises 80 %",
    "all_to_all": "GTC 2025, 8 GPUs: A100 210 of 300, H100 320 of 450, B200 640 of 900 GB/s; cards "
    "without a link, PCIe 5: 12 of 63. MI300X: as its all-reduce",
    "kernel_launch_s": "estimate for eager torch; no run in docs/planning_time.md waits for it; `calibrate` finds it",
    "host_sync_s": "estimate; `calibrate` measures it",
}
"""Where each field of `Efficiency` comes from."""

HOPPER = Efficiency()
AMPERE = replace(HOPPER, gemm=0.83, grouped_gemm=0.69, attention_forward=0.55, attention_backward=0.51, link=0.77)
ADA = replace(HOPPER, gemm=0.83, grouped_gemm=0.69, attention_forward=0.55, attention_backward=0.40)
RTX_4090 = replace(ADA, attention_forward=0.85, attention_backward=0.58)
BLACKWELL = replace(
    HOPPER, gemm=0.74, grouped_gemm=0.61, attention_forward=0.13, attention_backward=0.12, link=0.77, all_to_all=0.71
)
CDNA3 = replace(
    HOPPER, gemm=0.49, grouped_gemm=0.41, attention_forward=0.25, attention_backward=0.18, link=0.70, all_to_all=0.70
)


def _on_pcie(efficiency: Efficiency) -> Efficiency:
    """Return the shares of cards that talk to each other through the host's PCIe switches, which they share."""
    return replace(efficiency, link=0.76, all_to_all=0.19)


@dataclass(frozen=True)
class Sources:
    """The documents that a GPU's figures come from."""

    flops: str
    memory_bytes: str
    memory_rate: str
    link: str


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: its rates by datasheet, dense and in one direction.

    Vendors print twice the FLOP/s where they assume 2:4 sparsity, and twice a link's rate for both directions.
    """

    name: str
    """What a user types."""
    pattern: str
    """Whole words of the name that the driver reports; the first match in `GPUS` wins."""
    memory_bytes: int
    """What the driver lets a process see, less than what is printed on the box."""
    bf16: float
    """Dense FLOP/s with fp32 accumulation; fp16 has the same."""
    tf32: float
    fp32: float
    """FLOP/s of plain float32 products, without TF32."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """NVLink or Infinity Fabric to all others of the node together, one direction; PCIe's rate where there is none."""
    link_gpus: int
    """GPUs that the fast link joins; 1 where there is none."""
    host_bytes_per_s: float
    """To the host's memory, one direction."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for AMD."""
    source: Sources
    efficiency: Efficiency = HOPPER


@dataclass(frozen=True)
class Network:
    """What joins nodes.

    A collective over whole nodes shares the ports of a node: of an all-gather of S bytes, each of g GPUs' ports brings
    S / g into the node, and the fast link passes it on. An all-to-all has only its own GPU's port (sjeaugey in
    github.com/NVIDIA/nccl-tests, issue 267).
    """

    name: str
    """What a user types."""
    bytes_per_s: float
    """Per GPU and direction, each GPU with a port of its own."""
    latency_s: float
    """Seconds from one process to another for a message without content; an estimate."""
    source: str


def _gib(size: float) -> int:
    return round(size * 2**30)


PCIE4, PCIE5 = 31.5e9, 63e9
"""16 lanes in one direction, less the code of 128 bits in 130; datasheets print 64 and 128 GB/s for both directions."""

# A variant stands before the family's plain name.
GPUS = (
    Gpu(
        name="gb200",
        pattern=r"GB200",
        memory_bytes=_gib(184.31),
        bf16=2500e12,
        tf32=1250e12,
        fp32=80e12,
        memory_bytes_per_s=8e12,
        link_bytes_per_s=900e9,
        link_gpus=72,
        host_bytes_per_s=225e9,
        capability=(10, 0),
        source=Sources(
            "Blackwell architecture technical brief V2.1, NVL72, half of sparse; as quoted by marin, pull request 7334",
            "torch's messages; box: 186 GB",
            "NVIDIA GB200 NVL72 datasheet, 16 TB/s per two GPUs; as quoted by ml-engineering",
            "NVLink 5, 1.8 TB/s both ways; as quoted by ml-engineering. Host: NVLink-C2C, 900 GB/s for two; not read",
        ),
        efficiency=BLACKWELL,
    ),
    Gpu(
        name="b200-192gb",
        pattern=r"B200",
        memory_bytes=_gib(178.35),
        bf16=2250e12,
        tf32=1100e12,
        fp32=80e12,
        memory_bytes_per_s=7.7e12,
        link_bytes_per_s=900e9,
        link_gpus=8,
        host_bytes_per_s=PCIE5,
        capability=(10, 0),
        source=Sources(
            "Blackwell architecture technical brief, HGX, half of sparse; as quoted by glennklockwood.com/garden",
            "torch's messages; box: 192 GB, of which HGX B200 sells 180",
            "NVIDIA Blackwell datasheet; as quoted by aiconfigurator, pull request 1246 (pytorch/ao 4002: 7.67)",
            "NVLink 5, 1.8 TB/s both ways; as quoted by ml-engineering",
        ),
        efficiency=BLACKWELL,
    ),
    Gpu(
        name="h200-nvl",
        pattern=r"H200 NVL",
        memory_bytes=_gib(139.8),
        bf16=835.5e12,
        tf32=417.5e12,
        fp32=60e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        link_gpus=4,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H200 datasheet, NVL column, half of sparse; not read",
            "as the SXM module's",
            "NVIDIA H200 datasheet; not read",
            "NVLink bridge of 2 or 4 cards, 900 GB/s both ways (NVIDIA H200 datasheet; not read)",
        ),
        efficiency=HOPPER,
    ),
    Gpu(
        name="h200-141gb",
        pattern=r"H200",
        memory_bytes=_gib(139.8),
        bf16=989.5e12,
        tf32=494.5e12,
        fp32=67e12,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        link_gpus=8,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H200 datasheet, SXM column, half of sparse; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA H200 datasheet; as quoted by ml-engineering",
            "NVLink 4, 900 GB/s both ways; as quoted by ml-engineering",
        ),
        efficiency=HOPPER,
    ),
    Gpu(
        name="h100-nvl",
        pattern=r"H100 NVL",
        memory_bytes=_gib(93.1),
        bf16=835.5e12,
        tf32=417.5e12,
        fp32=60e12,
        memory_bytes_per_s=3.9e12,
        link_bytes_per_s=300e9,
        link_gpus=2,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H100 datasheet, NVL column, half of sparse; not read",
            "torch's messages",
            "NVIDIA H100 datasheet, NVL column; not read",
            "NVLink bridge of two cards, 600 GB/s both ways (NVIDIA H100 datasheet; not read)",
        ),
        efficiency=HOPPER,
    ),
    Gpu(
        name="h100-pcie",
        pattern=r"H100 PCIe",
        memory_bytes=_gib(79.18),
        bf16=756e12,
        tf32=378e12,
        fp32=51e12,
        memory_bytes_per_s=2e12,
        link_bytes_per_s=PCIE5,
        link_gpus=1,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H100 datasheet, PCIe column, half of sparse; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA H100 PCIe product brief PB-11133; read in a copy",
            "PCIe 5.0 x16; the optional NVLink bridge of two cards is left out",
        ),
        efficiency=_on_pcie(HOPPER),
    ),
    Gpu(
        name="h100-80gb",
        pattern=r"H100",
        memory_bytes=_gib(79.18),
        bf16=989.5e12,
        tf32=494.5e12,
        fp32=67e12,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        link_gpus=8,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H100 datasheet, SXM column, half of sparse; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA H100 datasheet, SXM column; as quoted by ml-engineering",
            "NVLink 4, 900 GB/s both ways; as quoted by ml-engineering",
        ),
        efficiency=HOPPER,
    ),
    Gpu(
        name="h20",
        pattern=r"H20",
        memory_bytes=_gib(95.0),
        bf16=148e12,
        tf32=74e12,
        fp32=44e12,
        memory_bytes_per_s=4e12,
        link_bytes_per_s=450e9,
        link_gpus=8,
        host_bytes_per_s=PCIE5,
        capability=(9, 0),
        source=Sources(
            "NVIDIA H20 product brief, not read; 148 and 74 as quoted by TileOPs, pull request 1658",
            "torch's messages, of a GPU of 96 GB that they do not name",
            "NVIDIA H20 product brief, not read",
            "NVLink 4, 900 GB/s both ways (NVIDIA H20 product brief, not read)",
        ),
        efficiency=replace(HOPPER, gemm=0.90, grouped_gemm=0.75, attention_forward=0.60, attention_backward=0.55),
    ),
    Gpu(
        name="a100-80gb-pcie",
        pattern=r"A100 80GB PCIe",
        memory_bytes=_gib(79.25),
        bf16=312e12,
        tf32=156e12,
        fp32=19.5e12,
        memory_bytes_per_s=1.935e12,
        link_bytes_per_s=PCIE4,
        link_gpus=1,
        host_bytes_per_s=PCIE4,
        capability=(8, 0),
        source=Sources(
            "NVIDIA A100 datasheet; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA A100 datasheet, 80GB PCIe column; as quoted by ml-engineering",
            "PCIe 4.0 x16; the optional NVLink bridge of two cards is left out",
        ),
        efficiency=_on_pcie(AMPERE),
    ),
    Gpu(
        name="a100-40gb-pcie",
        pattern=r"A100-PCIE-40GB",
        memory_bytes=_gib(39.5),
        bf16=312e12,
        tf32=156e12,
        fp32=19.5e12,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=PCIE4,
        link_gpus=1,
        host_bytes_per_s=PCIE4,
        capability=(8, 0),
        source=Sources(
            "NVIDIA A100 datasheet; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA A100 datasheet, 40GB PCIe column; not read",
            "PCIe 4.0 x16; the optional NVLink bridge of two cards is left out",
        ),
        efficiency=_on_pcie(AMPERE),
    ),
    Gpu(
        name="a100-80gb",
        pattern=r"A100-SXM4-80GB",
        memory_bytes=_gib(79.25),
        bf16=312e12,
        tf32=156e12,
        fp32=19.5e12,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,
        link_gpus=8,
        host_bytes_per_s=PCIE4,
        capability=(8, 0),
        source=Sources(
            "NVIDIA A100 datasheet; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA A100 datasheet, 80GB SXM column; not read",
            "NVLink 3, 600 GB/s both ways; as quoted by ml-engineering",
        ),
        efficiency=AMPERE,
    ),
    Gpu(
        name="a100-40gb",
        pattern=r"A100",
        memory_bytes=_gib(39.5),
        bf16=312e12,
        tf32=156e12,
        fp32=19.5e12,
        memory_bytes_per_s=1.555e12,
        link_bytes_per_s=300e9,
        link_gpus=8,
        host_bytes_per_s=PCIE4,
        capability=(8, 0),
        source=Sources(
            "NVIDIA A100 datasheet; as quoted by ml-engineering",
            "torch's messages",
            "NVIDIA A100 datasheet, 40GB SXM column; not read",
            "NVLink 3, 600 GB/s both ways; as quoted by ml-engineering",
        ),
        efficiency=AMPERE,
    ),
    Gpu(
        name="l40s",
        pattern=r"L40S",
        memory_bytes=_gib(44.4),
        bf16=362.05e12,
        tf32=183e12,
        fp32=91.6e12,
        memory_bytes_per_s=864e9,
        link_bytes_per_s=PCIE4,
        link_gpus=1,
        host_bytes_per_s=PCIE4,
        capability=(8, 9),
        source=Sources(
            "NVIDIA L40S datasheet; as quoted by ml-engineering",
            "torch's messages, of an L40",
            "NVIDIA L40S datasheet; as quoted by ml-engineering",
            "PCIe 4.0 x16; the card has no NVLink",
        ),
        efficiency=_on_pcie(ADA),
    ),
    Gpu(
        name="a10",
        pattern=r"A10",
        memory_bytes=_gib(22.06),
        bf16=125e12,
        tf32=62.5e12,
        fp32=31.2e12,
        memory_bytes_per_s=600e9,
        link_bytes_per_s=PCIE4,
        link_gpus=1,
        host_bytes_per_s=PCIE4,
        capability=(8, 6),
        source=Sources(
            "NVIDIA A10 datasheet; not read",
            "torch's messages, of a GPU of 24 GB that they do not name",
            "NVIDIA A10 datasheet; not read",
            "PCIe 4.0 x16; the card has no NVLink",
        ),
        efficiency=_on_pcie(AMPERE),
    ),
    Gpu(
        name="rtx4090",
        pattern=r"RTX 4090(?! (?:D|Laptop))",
        memory_bytes=_gib(23.52),
        bf16=165.2e12,
        tf32=82.6e12,
        fp32=82.6e12,
        memory_bytes_per_s=1.008e12,
        link_bytes_per_s=PCIE4,
        link_gpus=1,
        host_bytes_per_s=PCIE4,
        capability=(8, 9),
        source=Sources(
            "NVIDIA Ada GPU architecture whitepaper, appendix A; not read",
            "torch's messages",
            "NVIDIA Ada GPU architecture whitepaper, appendix A; not read",
            "PCIe 4.0 x16; the card has no NVLink",
        ),
        efficiency=_on_pcie(RTX_4090),
    ),
    Gpu(
        name="mi300x",
        pattern=r"MI300X",
        memory_bytes=_gib(191.98),
        bf16=1307.4e12,
        tf32=653.7e12,
        fp32=163.4e12,
        memory_bytes_per_s=5.3e12,
        link_bytes_per_s=448e9,
        link_gpus=8,
        host_bytes_per_s=PCIE5,
        capability=None,
        source=Sources(
            "AMD Instinct MI300X datasheet; as quoted by ml-engineering",
            "torch's messages",
            "AMD Instinct MI300X datasheet; as quoted by ml-engineering",
            "7 Infinity Fabric links of 128 GB/s both ways, 64 GB/s between two GPUs; as quoted by ml-engineering",
        ),
        efficiency=CDNA3,
    ),
)
"""Every GPU that the planner knows."""

_DGX_A100 = "ConnectX-6 with 200 Gbit/s per GPU, as in DGX A100; GTC 2025"
_DGX_H100 = "ConnectX-7 with 400 Gbit/s per GPU, as in DGX H100; as quoted by ml-engineering"
_DGX_B300 = "ConnectX-8 with 800 Gbit/s per GPU, as in DGX B300; as quoted by ml-engineering"
NETWORKS = (
    Network("ib-200", 25e9, 5e-6, f"HDR InfiniBand, {_DGX_A100}"),
    Network("ib-400", 50e9, 5e-6, f"NDR InfiniBand, {_DGX_H100}"),
    Network("ib-800", 100e9, 5e-6, f"XDR InfiniBand, {_DGX_B300}"),
    Network("roce-200", 25e9, 8e-6, "RoCE, 1600 Gbit/s for eight A100, as in llm-foundry's benchmarks"),
    Network("roce-400", 50e9, 8e-6, f"RoCE, {_DGX_H100}"),
    Network("efa-50", 6.25e9, 20e-6, "AWS p4d: 4 x 100 Gbit/s for eight A100; as quoted by ml-engineering"),
    Network(
        "efa-400", 50e9, 20e-6, "AWS p5, p5e, p5en, p6-b200: 3200 Gbit/s for eight GPUs; as quoted by ml-engineering"
    ),
    Network("ethernet-100", 12.5e9, 30e-6, "by its name, 100 Gbit/s per GPU; TCP"),
    Network("ethernet-25", 3.125e9, 30e-6, "by its name, 25 Gbit/s per GPU; TCP"),
    Network("ethernet-10", 1.25e9, 50e-6, "by its name, 10 Gbit/s per GPU; TCP"),
)
"""Every network that the planner knows, by Gbit/s per GPU."""
