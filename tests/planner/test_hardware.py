"""The hardware table finds what users and drivers name, cites everything, and agrees with the page that prints it."""

import dataclasses
import re
from pathlib import Path

import pytest

from gptoss_dist.planner.datasheets import EFFICIENCY_SOURCES, GPUS, NETWORKS
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.planner.hardware import Efficiency, find_gpu, find_network, gpu_of_driver
from gptoss_dist.planner.parameters import count_parameters
from gptoss_dist.planner.timing.published import PUBLISHED, PublishedRun

PAGE = Path(__file__).parents[2] / "docs/planning_hardware.md"


def test_names_are_found_and_unknown_ones_are_answered_with_all_names():
    assert find_gpu("a100-80gb").memory_bytes == pytest.approx(85.1e9, rel=1e-3)
    assert find_network("ib-400").bytes_per_s == 50e9
    for find, rows in ((find_gpu, GPUS), (find_network, NETWORKS)):
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert [find(name) for name in names] == list(rows)
        with pytest.raises(ValueError, match="'H100' is unknown; use one of ") as error:
            find("H100")
        assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA B200", "b200-192gb"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B300 SXM6 AC", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_driver_s_name_gives_its_own_row(driver, name):
    """An earlier pattern must not swallow a variant, and a near namesake must not be guessed."""
    gpu = gpu_of_driver(driver)
    assert (gpu and gpu.name) == name


def test_every_pattern_is_reached():
    """Each row is the first match of some name: here its pattern itself, where that is plain text."""
    plain = [gpu for gpu in GPUS if not re.search(r"[(\[|]", gpu.pattern)]
    assert len(plain) == len(GPUS) - 1
    assert [gpu_of_driver(f"NVIDIA {gpu.pattern}") for gpu in plain] == plain


def test_every_figure_has_a_source_and_a_plausible_size():
    shares = [field.name for field in dataclasses.fields(Efficiency) if not field.name.endswith("_s")]
    assert set(EFFICIENCY_SOURCES) == {field.name for field in dataclasses.fields(Efficiency)}
    for gpu in GPUS:
        assert all(len(text) > 10 for text in dataclasses.astuple(gpu.source)), gpu.name
        assert gpu.fp32 <= gpu.tf32 <= gpu.bf16 <= 3e15
        # Both units were meant where the figures are written: TB/s of memory, GiB that the driver shows.
        assert 20e9 < gpu.memory_bytes < 220e9 and 0.5e12 < gpu.memory_bytes_per_s < 1e13
        assert gpu.host_bytes_per_s <= gpu.link_bytes_per_s < gpu.memory_bytes_per_s
        assert (gpu.link_bytes_per_s == gpu.host_bytes_per_s) == (gpu.link_gpus == 1)
        assert (gpu.capability is None) == (gpu.name == "mi300x")
        assert all(0.1 <= getattr(gpu.efficiency, share) < 1 for share in shares), gpu.name
        assert gpu.efficiency.grouped_gemm < gpu.efficiency.gemm
    for network in NETWORKS:
        assert network.source and 0 < network.latency_s < 1e-4
        assert network.bytes_per_s * 8 / 1e9 == int(network.name.rpartition("-")[2])


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_a_published_run_is_consistent_with_its_own_source(run: PublishedRun):
    """Batch, layout, weights and step time, each stated twice, agree; no run is faster than its GPU."""
    gpu, network = find_gpu(run.gpu), find_network(run.network)
    assert run.micro_batch * run.accumulation * run.gpus == run.global_batch
    assert run.replicate * run.shard == run.gpus and run.gpus % run.gpus_per_node == 0
    assert run.shard % run.expert_parallel == 0 and run.model.num_local_experts % run.expert_parallel == 0
    assert count_parameters(run.model).total == pytest.approx(run.parameters, rel=2e-3)
    assert re.fullmatch(r"20\d\d-\d\d", run.date) and network
    assert re.search(r"github\.com/\S+ [0-9a-f]{7} \S+", run.source), "repository, commit and file"
    for seconds in re.findall(r"\| ([\d.]+) s\b", run.source):
        assert run.step_s == pytest.approx(float(seconds), rel=2e-3)
    mfu = flops_per_token(run.model, run.seq_len).training * run.tokens_per_s_per_gpu / gpu.bf16
    assert 0.1 < mfu < gpu.efficiency.gemm
    assert run.differs or run.assumed


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_prints_the_table():
    def size(rate: float, unit: float) -> str:
        return f"{rate / unit:g}"

    assert rows("GPUs") == [
        [
            f"`{gpu.name}`",
            f"{gpu.memory_bytes / 2**30:.2f}".rstrip("0").rstrip("."),
            size(gpu.bf16, 1e12),
            size(gpu.fp32, 1e12),
            size(gpu.memory_bytes_per_s, 1e9),
            f"{size(gpu.link_bytes_per_s, 1e9)} ({gpu.link_gpus})",
            size(gpu.host_bytes_per_s, 1e9),
        ]
        for gpu in GPUS
    ]
    assert rows("Networks") == [[f"`{n.name}`", size(n.bytes_per_s, 1e9), size(n.latency_s, 1e-6)] for n in NETWORKS]
    default = Efficiency()
    assert [(row[0].strip("`"), row[1]) for row in rows("What software reaches")] == [
        (name, size(value, 1e-6) + " us" if name.endswith("_s") else f"{value:.2f}")
        for name, value in dataclasses.asdict(default).items()
    ]
    assert [(row[0].strip("`"), row[1]) for row in rows("Published runs")] == [
        (run.name, f"{run.tokens_per_s_per_gpu:,.0f}") for run in PUBLISHED
    ]
