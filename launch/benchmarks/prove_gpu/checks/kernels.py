"""Items `attention` and `grouped-gemm`: the fast kernels against their references, right first and fast then.

Errors are against the reference in float64, at the sizes of gpt-oss-20b and of the 502M model. Times are medians of
whole forward and backward passes, by the device's own clock on CUDA.

Shapes as in `gptoss_dist/ops`: B batch, T tokens, H query heads, K key/value heads, D head or hidden size; N rows,
E experts, I intermediate size.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gptoss_dist.ops.attention.documents import locate_documents
from gptoss_dist.ops.attention.sink_attention import sink_attention
from gptoss_dist.ops.experts.grouped_experts import BACKENDS, grouped_experts
from gptoss_dist.planner.flops import visible_pairs
from launch.benchmarks.prove_gpu.findings import Findings, run_item

LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""The most that a result may be off, as a share of the norm of what it should be."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device()).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device()) * scale).to(dtype)


def off(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative error of several tensors, each against its own norm."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)) for a, e in pairs)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call after two that are not counted."""
    times = []
    for index in range(repeats + 2):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            function()
            elapsed = 1e3 * (time.perf_counter() - start)
        times += [elapsed] if index >= 2 else []
    return statistics.median(times)


def forward_backward(function: Callable[..., Tensor], operands: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """Return the output of a function and the gradients of its operands."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def check(
    findings: Findings,
    name: str,
    fast: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    operands: list[Tensor],
    d_out: Tensor,
) -> None:
    """Check the output and all gradients of a function against its reference in float64.

    An error that it raises is a finding too: what comes next is checked all the same.
    """
    limit = LIMITS[d_out.dtype]
    try:
        actual = forward_backward(fast, operands, d_out)
        expected = forward_backward(reference, [x.double() for x in operands], d_out.double())
        error = off(actual, expected)
    except Exception as error:
        findings.check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        findings.check(name, error <= limit, f"off by {error:.1e} of {limit:.0e}")


def attention_operands(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    q, d_out = (random(B, T, H, D, dtype=dtype, seed=seed).transpose(1, 2) for seed in (0, 3))
    k, v = (random(B, T, K, D, dtype=dtype, seed=seed).transpose(1, 2) for seed in (1, 2))
    return [q, k, v, random(H, dtype=torch.float32, seed=4)], d_out


def attention(findings: Findings, work: Path) -> None:
    """Check `flash` in bf16 and `chunked` in float32, then time `flash` beside `chunked`."""
    T = 96 if findings.rehearse else 2048
    models = {"20B": (8, 2, 16), "502M": (4, 2, 24)} if findings.rehearse else {"20B": (64, 8, 64), "502M": (8, 4, 96)}
    window = 16 if findings.rehearse else 128
    ids_1T = (torch.arange(T, device=device()) // (T // 3 + 1))[None]
    for model, (H, K, D) in models.items():
        for backend, dtype in (("flash", torch.bfloat16), ("chunked", torch.float32)):
            operands, d_out = attention_operands(1, T, H, K, D, dtype)
            for label, options in (
                ("full", {}),
                (f"window {window}", {"window": window}),
                (f"window {window}, documents", {"window": window, "documents": locate_documents(ids_1T)}),
            ):

                def run(*inputs: Tensor, backend: str = backend, options: dict = options) -> Tensor:
                    return sink_attention(*inputs, backend=backend, **options)

                def exact(*inputs: Tensor, options: dict = options) -> Tensor:
                    return sink_attention(*inputs, backend="reference", **options)

                name = f"{backend}, {str(dtype).removeprefix('torch.')}, {model}, {label}"
                check(findings, f"{name}, T={T}", run, exact, operands, d_out)
    time_attention(findings, models["20B"], window)


def time_attention(findings: Findings, heads: tuple[int, int, int], window: int) -> None:
    (H, K, D), T = heads, 128 if findings.rehearse else 4096
    operands, d_out = attention_operands(1 if findings.rehearse else 2, T, H, K, D, torch.bfloat16)
    took = {}
    for backend, repeats in (("flash", 20), ("chunked", 3)):
        for label, limit in (("full", None), (f"window {window}", window)):

            def step(backend: str = backend, limit: int | None = limit) -> None:
                forward_backward(lambda *x: sink_attention(*x, window=limit, backend=backend), operands, d_out)

            took[backend, label] = milliseconds(step, 1 if findings.rehearse else repeats)
            findings.figure(f"{backend}, {label}, forward and backward", took[backend, label], "ms", f"20B, T={T}")
    # Two products forward; five backward, one of which computes the scores again.
    flops = 7 * 2 * operands[0].shape[0] * H * D * visible_pairs(T)
    rate = flops / took["flash", "full"] / 1e9
    findings.figure("flash, full", rate, "TFLOP/s", "7 products of 2 FLOPs per visible pair, recomputed scores too")
    findings.floor("flash, full: times as fast as chunked", took["chunked", "full"] / took["flash", "full"], least=1)


def expert_operands(N: int, E: int, D: int, I: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:  # noqa: E741
    shapes = {(N, D): 1.0, (E, D, 2 * I): D**-0.5, (E, 2 * I): 1.0, (E, I, D): I**-0.5, (E, D): 1.0}
    operands = [
        random(*shape, dtype=dtype, seed=seed, scale=scale) for seed, (shape, scale) in enumerate(shapes.items())
    ]
    return operands, random(N, D, dtype=dtype, seed=9)


def row_counts(N: int, E: int) -> dict[str, list[int]]:
    """Return ways to give N rows to E experts, ugly ones too."""
    geometric = [N >> (e + 1) for e in range(E)]
    geometric[0] += N - sum(geometric)
    return {
        "even": [N // E + (e < N % E) for e in range(E)],
        "skewed, empty experts": geometric,
        "all to the last": [0] * (E - 1) + [N],
        "no rows": [0] * E,
    }


def grouped_gemm(findings: Findings, work: Path) -> None:
    """Check the grouped back ends against the loop in float64, then time them beside it."""
    E, D, I, N = (4, 32, 48, 40) if findings.rehearse else (32, 2880, 2880, 4096)  # noqa: E741
    for backend, dtype in (
        ("grouped_mm", torch.bfloat16),
        ("grouped_mm", torch.float32),
        ("grouped_gemm", torch.bfloat16),
    ):
        type_name = str(dtype).removeprefix("torch.")
        if reason := BACKENDS[backend].why_not(dtype, (D, I), device()):
            findings.figure(f"{backend}, {type_name}", None, note=f"not there: {reason}")
            continue
        for label, counts in row_counts(N, E).items():
            operands, d_out = expert_operands(sum(counts), E, D, I, dtype)
            name = f"{backend}, {type_name}, {label}, {sum(counts)} rows of {D}"
            check(findings, name, experts(backend, counts), experts("loop", counts), operands, d_out)
    time_grouped_gemm(findings, E, D, I)


def experts(backend: str, counts: list[int]) -> Callable[..., Tensor]:
    tokens_E = torch.tensor(counts, device=device())
    return lambda x, w1, b1, w2, b2: grouped_experts(x, tokens_E, w1, b1, w2, b2, activation="gpt_oss", backend=backend)


def time_grouped_gemm(findings: Findings, E: int, D: int, I: int) -> None:  # noqa: E741
    N = 64 if findings.rehearse else 16384
    counts = row_counts(N, E)["even"]
    operands, d_out = expert_operands(N, E, D, I, torch.bfloat16)
    took = {}
    for backend in ("grouped_mm", "grouped_gemm", "loop"):
        if BACKENDS[backend].why_not(torch.bfloat16, (D, I), device()) is None:
            call = experts(backend, counts)
            took[backend] = milliseconds(
                lambda call=call: forward_backward(call, operands, d_out), 1 if findings.rehearse else 10
            )
            findings.figure(f"{backend}, forward and backward", took[backend], "ms", f"20B's experts, {N} rows, bf16")
    rate = 3 * 2 * N * 3 * D * I / took["grouped_mm"] / 1e9
    findings.figure("grouped_mm", rate, "TFLOP/s", "3 x the forward products, 2 FLOPs per multiply-add")
    findings.floor("grouped_mm: times as fast as the loop", took["loop"] / took["grouped_mm"], least=1)


if __name__ == "__main__":
    run_item({"attention": attention, "grouped-gemm": grouped_gemm}, __doc__)
