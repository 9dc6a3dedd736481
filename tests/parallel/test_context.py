"""Context parallelism: who has and fetches which tokens, and attention over processes beside attention in one."""

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gptoss_dist.ops.attention import cuda
from gptoss_dist.ops.attention.blocks import block_attention, block_attention_backward
from gptoss_dist.parallel.context import Part, halo_before, plan_halo
from gptoss_dist.parallel.ring import Split
from gptoss_dist.planner.tracing.host_reads import HostReadWatch
from gptoss_dist.planner.tracing.memory import memory_timeline
from gptoss_dist.planner.tracing.trace import Workload, trace_step
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from tests.support.context_attention import AttentionCase, B, C, K
from tests.support.ranks import run
from tests.support.reference import settings

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bf16": 3e-2}
SIZES = [(size, tokens) for size in (1, 2, 3, 4, 8) for tokens in (8, 16, 17, 61, 128, 1000) if tokens >= 2 * size]


@pytest.mark.parametrize("size, tokens", SIZES)
def test_every_token_is_on_one_process_and_all_have_as_many(size, tokens):
    split = Split(tokens, size)
    positions = [list(range(*chunk)) for rank in range(size) for chunk in split.chunks(rank)]
    assert sorted(itertools.chain(*positions)) == list(range(tokens))
    counts = [split.tokens_of(rank) for rank in range(size)]
    assert max(counts) - min(counts) <= 2
    # Pairs of a query and an earlier key: the head has few, the tail many.
    pairs = [sum(t + 1 for chunk in split.chunks(rank) for t in range(*chunk)) for rank in range(size)]
    assert max(pairs) - min(pairs) <= 2 * tokens


@pytest.mark.parametrize("size, tokens", SIZES)
@pytest.mark.parametrize("window", [1, 2, 16, 200])
def test_halos_are_the_tokens_before_each_chunk(size, tokens, window):
    """The exchange, played through with positions in the place of keys."""
    split = Split(tokens, size)
    halos = [plan_halo(split, rank, window) for rank in range(size)]
    own = [[t for chunk in split.chunks(rank) for t in range(*chunk)] for rank in range(size)]
    leaving = [[t for rows in halo.rows for t in own[rank][rows]] for rank, halo in enumerate(halos)]
    for rank, halo in enumerate(halos):
        received = []
        for source, other in enumerate(halos):
            assert other.sent[rank] == halo.received[source]
            begin = sum(other.sent[:rank])
            received += leaving[source][begin : begin + other.sent[rank]]
        for chunk, places in zip(split.chunks(rank), halo.places):
            assert [t for rows in places for t in received[rows]] == list(range(*halo_before(chunk, window)))
        for other, count in enumerate(halo.sent):
            if other != rank and min(split.chunk(i).size for i in range(2 * size)) >= window - 1:
                assert count <= (window - 1 if abs(other - rank) == 1 else 0)


def test_the_host_waits_once_for_where_documents_lie(monkeypatch):
    """Whatever the layers: for both chunks of a process, and for those behind their halos."""
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    ids = torch.tensor([[0] * 7 + [4] * 20 + [5] * 34])
    with HostReadWatch("cpu") as watch:
        part = Part(ids, ids, SimpleNamespace(group=None, size=3), {None, 5, 200})
    assert watch.calls == ["tolist"]
    assert None not in part.ring.documents


def block(documents: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return q, the gradient of o, k and v of a block of keys of which few, or no, queries see anything."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        *torch.randn(2, 3, 37, 4, 8, dtype=torch.float64, generator=generator),
        *torch.randn(2, 3, 23, 2, 8, dtype=torch.float64, generator=generator),
    ]
    first = torch.full((3, 37), 30)
    first[0, :20], first[1] = 7, 0
    return tensors, first if documents else None


def computed(forward, backward, documents: bool) -> list[torch.Tensor]:
    """Return o, exp(lse) and the gradients of a block beside a sink of 0."""
    (q, do, k, v), first = block(documents)
    o, lse = forward(q, k, v, first, 0.3)
    with_sink = torch.logaddexp(lse, torch.zeros_like(lse))
    o_with_sink = o * torch.exp(lse - with_sink).permute(1, 2, 0)[..., None]
    return [o, lse.exp(), *backward(do, q, k, v, o_with_sink, with_sink, first, 0.3)]


def on_cpu(kernel: str, documents: bool) -> list[torch.Tensor]:
    return computed(
        functools.partial(block_attention, kernel=kernel),
        functools.partial(block_attention_backward, kernel=kernel),
        documents,
    )


@pytest.mark.parametrize("documents", [False, True])
def test_blocks_agree(documents):
    results = [on_cpu(kernel, documents) for kernel in ("flash", "chunked")]
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13) and a.abs().max() > 0.1
    if documents:
        o = results[0][0]
        assert not o[2].any() and not o[0, 20:].any() and o[0, :20].any()


def varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale):
    """What CUDA's kernel computes, segment by segment; of nothing it leaves what was there, and an lse of +inf."""
    assert (dropout, causal) == (0.0, False)
    o, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.inf)
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        assert b - a <= longest_q and d - c <= longest_k
        if b > a and d > c:
            part, part_lse = block_attention(q[None, a:b], k[None, c:d], v[None, c:d], None, scale, "chunked")
            o[a:b], lse[:, a:b] = part[0], part_lse[:, 0]
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k)
    return o, lse, None, None, None


def varlen_backward(
    do, q, k, v, o, lse, cu_q, cu_k, longest_q, longest_k, dropout, causal, rng_state, unused, *, scale
):
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        if b > a and d > c:
            queries, keys = (x[None, a:b] for x in (do, q)), (x[None, c:d] for x in (k, v))
            rest = o[None, a:b], lse[:, None, a:b], None, scale, "chunked"
            parts = block_attention_backward(*queries, *keys, *rest)
            for whole, place, part in zip(gradients, ((a, b), (c, d), (c, d)), parts):
                whole[slice(*place)] = part[0]
    return gradients


@pytest.mark.parametrize("documents", [False, True])
def test_segments_of_cuda_s_kernel(monkeypatch, documents):
    """They are what is visible, and what the kernel leaves undefined does not come through."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", varlen_backward)
    found = computed(cuda.block_forward, cuda.block_backward, documents)
    for a, b in zip(found, on_cpu("flash", documents)):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_log_sum_exp_of_one_sequence_reaches_cuda_s_kernel_in_its_own_memory(monkeypatch):
    """A chunk's part of it is a view with gaps where B is 1, and the kernel reads memory without looking at strides."""
    given = []

    def backward(do, q, k, v, o, lse, *_, **__):
        given.append(lse)
        return q, k, v

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    x, kv, lse_HBT = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 2, 8), torch.arange(40.0).view(4, 1, 10)
    part_HN = lse_HBT[:, :, 3:7].flatten(1)
    assert not part_HN.is_contiguous()
    cuda.backward(x, x, kv, kv, x, part_HN, 0.3, None, None, 4)
    assert given[0].is_contiguous() and given[0].equal(part_HN)


def test_a_block_of_one_query_keeps_out_of_cuda_s_decoding_layout(monkeypatch):
    longest = []

    def forward(q, k, v, cu_q, cu_k, longest_q, longest_k, *_, **__):
        longest.append(longest_q)
        return q, q.new_zeros(q.shape[1], q.shape[0]), None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    cuda.block_forward(torch.zeros(2, 1, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8), None, 0.3)
    assert longest == [2]


@pytest.mark.parametrize("documents", [False, True])
def test_shapes_of_cuda_s_kernel(documents):
    (q, do, k, v), first = block(documents)
    q, do, k, v = (x.to("meta", torch.bfloat16) for x in (q, do, k, v))
    first = None if first is None else first.to("meta")
    o, lse = cuda.block_forward(q, k, v, first, 0.3)
    assert o.shape == q.shape and lse.shape == (4, 3, 37) and o.dtype == lse.dtype == torch.float32
    gradients = cuda.block_backward(do, q, k, v, q, lse, first, 0.3)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


QUICK = [
    *(AttentionCase(tokens, None, documents) for tokens in (40, 61) for documents in (False, True)),
    *(AttentionCase(tokens, 10, documents) for tokens in (40, 61) for documents in (False, True)),
    AttentionCase(61, 100, True),
    AttentionCase(8, None, True),  # as many tokens as chunks, of four processes
    AttentionCase(9, 2, True),
    AttentionCase(9, 1),
    AttentionCase(61, None, True, backend="chunked"),
    AttentionCase(61, None, True, "float32"),
    AttentionCase(61, 10, True, "bf16"),
    AttentionCase(61, None, False, "bf16"),
    AttentionCase(128, 17),
]
GRID = [
    AttentionCase(tokens, window, documents, dtype, backend)
    for tokens, window, documents, dtype, backend in itertools.product(
        (8, 11, 97, 128), (None, 1, 2, 16, 50), (False, True), TOLERANCES, ("flash", "chunked")
    )
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return a function that computes cases on a number of processes, once, and gives the results of each."""
    done = {}

    def compare(processes: int, cases: list[AttentionCase]) -> list[dict]:
        if (key := (processes, len(cases))) not in done:
            folder = tmp_path_factory.mktemp("context")
            (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
            script = "tests/support/context_attention.py"
            run(script, str(folder / "cases.json"), str(folder), processes=processes)
            done[key] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
        return done[key]

    return compare


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_attention_equals_that_of_one_process(compared, processes):
    check(compared(processes, QUICK), QUICK)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_attention_equals_that_of_one_process_in_a_grid(compared, processes):
    check(compared(processes, GRID), GRID)


def check(results: list[dict], cases: list[AttentionCase]) -> None:
    for result, case in itertools.product(results, cases):
        assert result[case.name]["error"] <= TOLERANCES[case.dtype], case.name


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_bytes(compared, processes):
    """Sliding layers send a window at most over each border, and full ones all there is to the next process."""
    results = compared(processes, QUICK)
    row = B * 2 * K * C * 8  # keys and values of a position, float64
    sliding, full = AttentionCase(128, 17), AttentionCase(40, None)
    for rank, result in enumerate(results):
        neighbours = [other for other in (rank - 1, rank + 1) if 0 <= other < processes]
        # A chunk has 16 tokens or more: the halo of a chunk comes from the one before. Gradients go the way back.
        halos = sum(16 * row for other in neighbours)
        assert 0 < result[sliding.name]["sent"] == 2 * halos
        # Forward N - 1 steps, and backward as many, and N with gradients.
        assert result[full.name]["sent"] == pytest.approx(row * 40 / processes * (3 * processes - 2), rel=0.1)


@pytest.mark.heavy
def test_the_work_of_a_sequence_is_divided():
    """Of two processes each holds half of the activations, and their attention is all that there is, once."""
    T, processes = 2048, 2

    def trace(degree: int, rank: int) -> tuple[int, int]:
        config = settings(sliding_window=2 * T, num_hidden_layers=2, max_position_embeddings=T)
        config.parallel.context_parallel = degree
        config.train.micro_batch_size = 1
        step = trace_step(engine_settings(config), Workload(T, processes, next_token_prediction, rank=rank))
        flops = sum(operator.flops for operator in step.step if "attention" in operator.name)
        return flops, int(memory_timeline(step).by_kind["activations"].max())

    flops, activations = trace(1, 0)
    parts = [trace(processes, rank) for rank in range(processes)]
    assert sum(part[0] for part in parts) == flops > 0
    assert max(part[0] for part in parts) < 1.01 * min(part[0] for part in parts)
    assert all(part[1] == pytest.approx(activations / processes, rel=0.05) for part in parts)
