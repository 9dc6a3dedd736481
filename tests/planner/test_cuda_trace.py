"""What runs on CUDA fits together, and where the host waits, on a machine without a GPU."""

from itertools import product
from pathlib import Path

import pytest
import torch

from gptoss_dist.distributed.collectives import LocalError
from gptoss_dist.model import moe
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.ops.attention import kernel_op
from gptoss_dist.planner.tracing.cuda_trace import CudaTrace, describe, trace_cuda, why_no_fake_cuda
from gptoss_dist.planner.tracing.host_reads import DOCUMENTED, GROUPED_MM

PLAIN, MORE = {}, {"documents": True, "checkpointing": 1}
FAST = [
    ("tiny", "fp32", (8, 0), MORE),
    ("gptoss_502m", "bf16", (8, 0), PLAIN),
    ("gptoss_20b", "bf16", (9, 0), MORE),
]
MODELS = ("tiny", "gptoss_502m", "gptoss_20b", "gptoss_120b")
EVERY = product(MODELS, ("bf16", "fp32"), ((8, 0), (9, 0), (10, 0)), (PLAIN, MORE))
VARIANTS = [pytest.param(*variant, marks=[] if variant in FAST else pytest.mark.slow) for variant in EVERY]
NO_FAKE_CUDA = why_no_fake_cuda()


def config(name: str) -> ModelConfig:
    return ModelConfig.from_yaml(Path(__file__).parents[2] / f"configs/model/{name}.yaml")


def trace(name: str | ModelConfig, precision="bf16", capability=(9, 0), seq_len=4096, batch=8, **options) -> CudaTrace:
    model = config(name) if isinstance(name, str) else name
    return trace_cuda(
        model, precision=precision, capability=capability, seq_len=seq_len, micro_batch_size=batch, **options
    )


def check(found: CudaTrace) -> None:
    """No wait but documented ones, as often as they are said to be, and the kernels that a step needs."""
    assert not found.undocumented
    layers = found.model.num_hidden_layers
    recomputed = layers // found.checkpointing if found.checkpointing else 0
    shared = int(found.model.num_shared_experts > 0)
    assert found.backends["attention"] == ("flash" if found.precision == "bf16" else "chunked")
    assert found.backends["experts"] == "grouped_mm"
    forward, *rest = found.phases.values()
    assert forward["_grouped_mm"] == 2 * (1 + shared) * layers
    flash = found.precision == "bf16"
    assert forward.get("_flash_attention_forward", 0) == flash * layers
    expected = {"rope.py": len(set(found.model.attention_types)), "documents.py": int(found.documents)}
    if found.device == "meta":
        backward, update = rest
        # Recomputation ends before the shared expert's last product, whose result no gradient needs.
        assert backward["_grouped_mm"] == 4 * (1 + shared) * layers + (2 + shared) * recomputed
        assert backward.get("_flash_attention_backward", 0) == flash * layers
        assert backward.get("_flash_attention_forward", 0) == flash * recomputed
        assert update["_fused_adamw_"] == 2 and update["_foreach_norm"] == 1
    has_kernel = flash and found.capability[0] in (9, 10)
    waiting = sum(count for read, count in found.host_reads.items() if read.call == GROUPED_MM)
    assert waiting == (0 if has_kernel else found.operators["_grouped_mm"])
    for file, times in expected.items():
        assert sum(count for read, count in found.host_reads.items() if read.file.endswith(file)) == times


@pytest.mark.parametrize("checkpointing", [0, 3])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_every_variant_of_a_small_model(precision, documents, checkpointing):
    check(trace("tiny", precision, (9, 0), 512, 2, documents=documents, checkpointing=checkpointing))


@pytest.mark.parametrize("name, precision, capability, options", VARIANTS)
def test_shipped_models(name, precision, capability, options):
    check(trace(name, precision, capability, **options))


@pytest.mark.skipif(NO_FAKE_CUDA is not None, reason=f"a fake CUDA tensor {NO_FAKE_CUDA}")
@pytest.mark.parametrize("name, precision, capability, options", VARIANTS)
def test_fake_cuda_tensors_run_what_the_meta_device_runs(name, precision, capability, options):
    """On them `auto` chooses by itself: the very same operators, as often and in the same order."""
    fake = trace(name, precision, capability, device="cuda", **options)
    check(fake)
    meta = trace(name, precision, capability, **options)
    assert list(fake.phases) == ["forward"]
    assert list(fake.phases["forward"].items()) == list(meta.phases["forward"].items())


@pytest.mark.skipif(NO_FAKE_CUDA is None, reason="this build of torch has fake CUDA tensors")
def test_fake_cuda_tensors_are_refused_elsewhere():
    with pytest.raises(ValueError, match=r"device='cuda' needs the CUDA build of torch, .*; choose device='meta'"):
        trace("tiny", device="cuda")


@pytest.mark.parametrize("precision, hidden", [("bf16", 100), ("fp32", 102)])
def test_sizes_that_the_fast_back_ends_refuse(precision, hidden):
    """`auto` takes the loop, which reads row counts, and chunked attention for heads that are no multiple of 8."""
    model = ModelConfig(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        num_local_experts=5,
        num_experts_per_tok=2,
        num_shared_experts=1,
    )
    found = trace(model, precision, (9, 0), 7, 3, checkpointing=1)
    assert found.backends == {"attention": "chunked", "experts": "loop", "shared expert": "loop"}
    assert not found.undocumented and "_grouped_mm" not in found.operators
    reads = sum(count for read, count in found.host_reads.items() if read.function == "loop_experts")
    assert reads == 2 * 2 * model.num_hidden_layers  # routed and shared, forward and recomputed


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 if grad.sum() > 0 else 2)


PLANTS = {
    "item": lambda x: x * x.sum().item(),
    "__bool__": lambda x: x if (x > 0).all() else -x,
    "tolist": lambda x: x * len(x[0].tolist()),
    "cpu": lambda x: x + x.cpu().sum().item(),
    "nonzero": lambda x: x + (x > 0).nonzero().sum(),
    "copy from the host": lambda x: x + torch.tensor([1.0], device=x.device).to(x.dtype),
    "in the backward pass": _Planted.apply,
}


@pytest.mark.parametrize(
    "device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(NO_FAKE_CUDA is not None, reason="CUDA build"))]
)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_read_is_found(plant, device, monkeypatch):
    linear = moe.linear

    def reading(x, weight, bias):
        return PLANTS[plant](linear(x, weight, bias))

    monkeypatch.setattr(moe, "linear", reading)
    found = trace("tiny", seq_len=64, batch=2, device=device)
    if plant == "in the backward pass":
        planted = {(r.call, r.file, r.function) for r in found.undocumented}
        expected = {("_local_scalar_dense", "tests/planner/test_cuda_trace.py", "backward")}
        assert planted == (set() if device == "cuda" else expected)  # no backward pass there
        return
    (read,) = (read for read in found.undocumented if read.call == plant)
    assert read.file == "tests/planner/test_cuda_trace.py" and read.function == "<lambda>"
    line = Path(__file__).read_text().splitlines()[read.line - 1]
    assert line.strip().startswith(f'"{plant}"') and found.host_reads[read] == found.model.num_hidden_layers
    assert f"{found.model.num_hidden_layers:>5} x {read}\n        UNDOCUMENTED" in describe(found)


def test_a_shape_function_that_lies_is_found(monkeypatch):
    forward = kernel_op.KERNELS["gptoss_dist::sink_attention"]

    def lying(*args):
        o_BTHD, lse_HN = forward(*args)
        return o_BTHD, lse_HN.double()

    monkeypatch.setitem(kernel_op.KERNELS, "gptoss_dist::sink_attention", lying)
    with pytest.raises(RuntimeError, match=r"sink_attention: its shape function says .*float32.* give .*float64"):
        trace("tiny", seq_len=64)


def test_too_many_rows_for_the_kernels_are_refused():
    """What megablocks' kernels could not address on a GPU is refused here too."""
    with pytest.raises(LocalError, match=r"exceed the 2\^31 elements"):
        trace("gptoss_20b", batch=64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "fp16"}, "precision='fp16' is unknown; choose one of fp32, bf16"),
        ({"batch": 0}, "micro_batch_size=0 must be at least 1"),
        ({"checkpointing": -1}, "checkpointing=-1 must be at least 0"),
        ({"device": "cpu"}, "device='cpu' cannot be traced; choose meta or cuda"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        trace("tiny", **options)


def test_the_screen():
    before = torch.cuda.get_device_capability
    text = describe(trace("tiny", "fp32", (8, 0), 512, 2, documents=True, checkpointing=2))
    assert torch.cuda.get_device_capability is before
    lines = text.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) < 120
    for words in ("fp32", "capability 8.0", "attention chunked", "_fused_adamw_", "locate_documents", "every 2. block"):
        assert words in text
    assert "UNDOCUMENTED" not in text


def test_documented_reads_are_where_they_are_said_to_be():
    root = Path(__file__).parents[2]
    for entry in DOCUMENTED:
        if entry.file:
            assert f"def {entry.function}(" in (root / entry.file).read_text()
