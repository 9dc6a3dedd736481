"""Every back end of sink attention against the definition: forward, gradients, memory, composition.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head_dim.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gptoss_dist.ops.attention import cuda, tiled
from gptoss_dist.ops.attention.documents import locate_documents, locate_documents_of_runs
from gptoss_dist.ops.attention.sink_attention import (
    AUTO_ORDER,
    BACKENDS,
    causal_visibility,
    masked_sink_attention,
    sink_attention,
)
from gptoss_dist.ops.backends import choose
from gptoss_dist.planner.tracing.host_reads import HostReadWatch

FAST = ("flash", "chunked")
NAMES = ("o", "dq", "dk", "dv", "dsinks")


def make_inputs(B, T, H, K, D, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v as the model lays them out (transposed views of [B, T, heads, D]), sinks, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def heads(n):
        return torch.randn(B, T, n, D, generator=generator).to(device, dtype).transpose(1, 2)

    return (heads(H), heads(K), heads(K), torch.randn(H, generator=generator).to(device)), heads(H)


def run(inputs, do, function=sink_attention, **kwargs):
    """o and the gradients of (o * do).sum() to q, k, v, sinks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves, **kwargs)
    o.backward(do)
    return [o.detach(), *(x.grad for x in leaves)]


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of each tensor's largest entry (float32 sums over many keys round at that scale)."""
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        error = (a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def packed_ids(lengths, T):
    """Document ids of one sequence; the last document fills it up."""
    lengths = [*lengths, T - sum(lengths)]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def located(ids_BT):
    """The documents of ids, or None of None."""
    return None if ids_BT is None else locate_documents(ids_BT)


def by_definition(q_BHTD, k_BKTD, v_BKTD, sinks_H, *, window=None, document_ids_BT=None):
    """One query at a time, in float64, sharing nothing with the library: softmax over visible keys and the sink."""
    B, H, T, D = q_BHTD.shape
    group = H // k_BKTD.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                keys = [j for j in range(i + 1) if window is None or i - j < window]
                if document_ids_BT is not None:
                    keys = [j for j in keys if document_ids_BT[b, j] == document_ids_BT[b, i]]
                scores = k_BKTD[b, h // group, keys] @ q_BHTD[b, h, i] / D**0.5
                p = torch.cat((scores, sinks_H[h : h + 1])).softmax(0)[:-1]
                rows.append(p @ v_BKTD[b, h // group, keys])
    return torch.stack(rows).view(B, H, T, D)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_reference_is_the_definition(window, documents):
    inputs, do = make_inputs(2, 11, 4, 2, 8)
    ids = torch.stack((packed_ids([1, 6], 11), packed_ids([4], 11))) if documents else None
    expected = run([x.double() for x in inputs], do.double(), by_definition, window=window, document_ids_BT=ids)
    assert_close(run(inputs, do, window=window, documents=located(ids), backend="reference"), expected, 1e-6)


@pytest.mark.parametrize("window", [None, 1, 8, 127, 128, 129, 400])
@pytest.mark.parametrize(
    "B, T, H, K, D", [(2, 1, 4, 2, 32), (1, 127, 4, 4, 64), (2, 128, 6, 2, 32), (2, 129, 3, 1, 96), (2, 300, 8, 4, 32)]
)
def test_equals_reference(B, T, H, K, D, window):
    inputs, do = make_inputs(B, T, H, K, D)
    expected = run(inputs, do, window=window, backend="reference")
    for backend in FAST:
        assert_close(run(inputs, do, window=window, backend=backend), expected)


@pytest.mark.parametrize("window", [None, 8, 64, 300])
@pytest.mark.parametrize("T", [1, 70, 300])
def test_packed_documents(T, window):
    """Documents of length 1, shorter and longer than the window, ending on and off block edges; ids with gaps."""
    rows = [[1] * (T // 2), [T - 1] if T > 1 else [], [min(T, 64), 3] if T > 67 else []]
    ids = torch.stack([packed_ids([n for n in row if n], T) * 7 - 3 for row in rows])
    inputs, do = make_inputs(3, T, 4, 2, 32)
    kwargs = {"window": window, "documents": located(ids)}
    expected = run(inputs, do, backend="reference", **kwargs)
    for backend in FAST:
        assert_close(run(inputs, do, backend=backend, **kwargs), expected)


@pytest.mark.parametrize("backend", FAST)
def test_documents_do_not_see_each_other(backend):
    """Packing two documents gives each what it gets alone."""
    inputs, do = make_inputs(1, 90, 4, 2, 32)
    packed = run(inputs, do, window=50, documents=locate_documents(packed_ids([40], 90)[None]), backend=backend)
    parts = [
        run([x[:, :, piece] for x in inputs[:3]] + [inputs[3]], do[:, :, piece], window=50, backend=backend)
        for piece in (slice(0, 40), slice(40, 90))
    ]
    alone = [torch.cat(pair, dim=2) for pair in zip(*(p[:4] for p in parts))] + [parts[0][4] + parts[1][4]]
    assert_close(packed, alone)


@pytest.mark.parametrize("backend", FAST)
def test_window_counts_the_query_itself(backend):
    """With a value of one at key 0 only, a window of 128 shows it to queries 0 to 127."""
    (q, k, v, sinks), _ = make_inputs(1, 200, 2, 1, 32)
    v = torch.zeros_like(v)
    v[:, :, 0] = 1
    reach = {
        w: int(sink_attention(q, k, v, sinks, window=w, backend=backend)[0, 0, :, 0].nonzero().max())
        for w in (127, 128, 129)
    }
    assert reach == {127: 126, 128: 127, 129: 128}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sink", [-1e4, 60.0])
def test_extreme_sinks(backend, sink):
    """A sink far below the scores changes nothing; one far above takes all, without overflow."""
    (q, k, v, sinks), do = make_inputs(1, 64, 4, 2, 32)
    o, *grads = run((q, k, v, torch.full_like(sinks, sink)), do, backend=backend)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o, plain if sink < 0 else torch.zeros_like(o), atol=1e-5, rtol=0)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 16])
def test_float64_gradients_by_finite_differences(window, backend):
    """Against numbers, not another implementation; float64 also shows that nothing is rounded to float32 on the way."""
    inputs, _ = make_inputs(1, 40, 2, 1, 8, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: sink_attention(*x, window=window, backend=backend), leaves, fast_mode=True
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 128])
def test_bfloat16_is_rounded_only_at_the_edges(window, backend):
    """Half a bf16 step per entry at the largest magnitude (2^-9 relative), plus what o's rounding adds to gradients."""
    inputs, do = make_inputs(2, 300, 8, 2, 32, dtype=torch.bfloat16)
    result = run(inputs, do, window=window, backend=backend)
    assert [x.dtype for x in result] == [torch.bfloat16] * 4 + [torch.float32]
    exact = run([x.float() for x in inputs], do.float(), window=window, backend="reference")
    assert_close(result, exact, 4e-3)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "window, documents",
    [(100, True), *(pytest.param(None, documents, marks=pytest.mark.slow) for documents in (False, True))],
)
def test_fused_rounds_scores_as_well(window, documents):
    """Scores, probabilities and their gradients pass through bf16: about four roundings where the others have one."""
    inputs, do = make_inputs(2, 300, 8, 2, 32, dtype=torch.bfloat16)
    ids = packed_ids([100, 30], 300).expand(2, -1).contiguous() if documents else None
    kwargs = {"window": window, "documents": located(ids)}
    result = run(inputs, do, backend="fused", **kwargs)
    assert [x.dtype for x in result] == [torch.bfloat16] * 4 + [torch.float32]
    exact = run([x.float() for x in inputs], do.float(), backend="reference", **kwargs)
    assert_close(result, exact, 1.2e-2)


@pytest.mark.compiled
def test_the_compiler_gets_fused_only_where_bf16_is_fast(bf16_products):
    """`fused` alone differs from what runs outside of the compiler."""
    inputs, do = make_inputs(2, 300, 8, 2, 32, dtype=torch.bfloat16)

    def attend(*x):
        return sink_attention(*x, window=100)

    result = run(inputs, do, torch.compile(attend, backend="aot_eager", fullgraph=True))
    same = [torch.equal(a, b) for a, b in zip(result, run(inputs, do, attend))]
    assert all(same) if bf16_products == "multiplied in float32" else not any(same)


def test_masked_attention_in_bf16(bf16_products):
    inputs, do = make_inputs(2, 40, 8, 2, 32, dtype=torch.bfloat16)
    visible = causal_visibility(40, 12, None, do.device)
    result = run(inputs, do, lambda *x: masked_sink_attention(*x, visible))
    assert [x.dtype for x in result] == [torch.bfloat16] * 4 + [torch.float32]
    exact = run([x.float() for x in inputs], do.float(), window=12, backend="reference")
    assert_close(result, exact, 4e-3 if bf16_products == "multiplied in float32" else 1.2e-2)


def test_layout_and_dtypes():
    """The model consumes o as [B, T, H * D] without a copy; bf16 sinks get bf16 gradients."""
    inputs, do = make_inputs(2, 130, 4, 2, 32)
    inputs = (*inputs[:3], inputs[3].bfloat16())
    for window in (None, 16):
        result = run(inputs, do, window=window)
        assert result[0].transpose(1, 2).is_contiguous()
        assert result[4].dtype == torch.bfloat16 and result[4].abs().min() > 0


@pytest.mark.parametrize("T, visible_dims", [(1, 2), (5, 2), (5, 3)])
def test_masked_attention_continues_a_sequence(T, visible_dims):
    """The last T queries against all keys give the last T rows of the whole, whether the mask has a batch or not."""
    inputs, _ = make_inputs(2, 40, 8, 2, 32)
    q, k, v, sinks = inputs
    visible = causal_visibility(40, 12, None, q.device)[-T:]
    visible = visible.expand(2, -1, -1) if visible_dims == 3 else visible
    o = masked_sink_attention(q[:, :, -T:], k, v, sinks, visible)
    torch.testing.assert_close(o, sink_attention(*inputs, window=12)[:, :, -T:], atol=1e-5, rtol=0)
    nothing = masked_sink_attention(q[:, :, -T:], k, v, sinks, torch.zeros_like(visible))
    assert (nothing == 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kernel, window, documents",
    [
        ("flash", None, False),
        ("flash", None, True),
        ("flash", 128, False),
        ("flash", 128, True),
        ("chunked", None, False),
        ("chunked", 128, True),
    ],
)
def test_largest_tensor_grows_linearly(kernel, window, documents):
    """Called beneath the custom op, inside which a dispatch mode sees nothing."""
    heads = {"flash": 5, "chunked": 7}[kernel]  # of no other test, which would leave masks of these sizes behind
    largest = []
    for T in (1024, 4096):
        (q, k, v, sinks), do = make_inputs(1, T, heads, 1, 8)
        q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
        first_BT = (torch.arange(T)[None] // 100 * 100) if documents else None
        with LargestTensor() as record:
            o, lse = tiled.forward(q, k, v, sinks, 0.3, window, first_BT, kernel)
            tiled.backward(do, q, k, v, o, lse, 0.3, window, first_BT, kernel)
        largest.append(record.elements)
    assert largest[0] > o.numel() / 4, "the mode saw no intermediate tensor"
    assert largest[1] <= 4.2 * largest[0]


def peak_mib(function) -> float:
    """By how much the resident memory of this process grows at most while `function` runs (also within kernels)."""

    def highest() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the highest is now the present (proc(5))
    before = highest()
    function()
    return highest() - before


@pytest.mark.distributed
def test_peak_memory_of_a_process():
    """At T = 4096 one float32 T x T matrix for two heads is 128 MiB; the whole process adds a small part of that."""

    def step(window):
        q, k, v = (torch.randn(1, 4096, h, 16, requires_grad=True).transpose(1, 2) for h in (2, 1, 1))
        sink_attention(q, k, v, torch.zeros(2, requires_grad=True), window=window).sum().backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        windowed, full, matrix = (peak_mib(f) for f in (lambda: step(128), lambda: step(None), two_matrices))
    finally:
        torch.set_num_threads(threads)
    assert windowed < 40 and full < 64, f"{windowed:.0f} and {full:.0f} MiB"
    assert matrix > 100, "the measurement cannot see what it is for"


def two_matrices() -> None:
    torch.ones(2, 4096, 4096)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(window, reentrant):
    inputs, do = make_inputs(2, 70, 4, 2, 32)
    documents = locate_documents(packed_ids([20, 31], 70).expand(2, -1).contiguous())

    def function(*leaves):
        return checkpoint(
            lambda *x: sink_attention(*x, window=window, documents=documents), *leaves, use_reentrant=reentrant
        )

    expected = run(inputs, do, window=window, documents=documents)
    for a, e in zip(run(inputs, do, function), expected, strict=True):
        assert torch.equal(a, e)


def test_compiles_without_graph_breaks():
    """Around the op, forward and backward; `aot_eager` traces as inductor does, without its compile time."""
    inputs, do = make_inputs(2, 70, 4, 2, 32)

    def block(q, k, v, sinks):
        return sink_attention(q * 2, k, v, sinks.clamp(-10, 15), window=16) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(run(inputs, do, compiled), run(inputs, do, block))


def test_compiles_with_documents():
    inputs, do = make_inputs(2, 70, 4, 2, 32)
    documents = locate_documents(packed_ids([20, 31], 70).expand(2, -1).contiguous())

    def block(*x):
        return sink_attention(*x, documents=documents) + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(run(inputs, do, compiled), run(inputs, do, block))


@pytest.mark.parametrize("T", [40, 64])
@pytest.mark.parametrize("kernel, window", [("flash", None), ("flash", 16), ("chunked", 16)])
def test_custom_op_is_registered_correctly(kernel, window, T):
    """Schema, aliasing, shapes and strides of the fake against the real op, and autograd, by PyTorch's own checks."""
    (q, k, v, sinks), _ = make_inputs(2, T, 4, 2, 16)
    tensors = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)] + [sinks.requires_grad_()]
    arguments = (*tensors, 0.25, window, None, None, T, kernel)
    for output, fake in zip(
        torch.ops.gptoss_dist.sink_attention(*arguments),
        torch.ops.gptoss_dist.sink_attention(*(x.to("meta") if torch.is_tensor(x) else x for x in arguments)),
        strict=True,
    ):
        assert output.stride() == fake.stride()
    torch.library.opcheck(torch.ops.gptoss_dist.sink_attention.default, arguments)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("documents", [False, True])
def test_cuda_calls_fit_the_kernels_signatures(window, documents):
    """Without a GPU: PyTorch's shape functions of the CUDA kernels accept the calls and return what is expected."""
    q = torch.empty(2, 40, 4, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 40, 2, 64, device="meta", dtype=torch.bfloat16)
    sinks = torch.empty(4, device="meta")
    cu_seqlens = torch.empty(6, device="meta", dtype=torch.int32) if documents else None
    o, lse = cuda.forward(q, k, k, sinks, 0.125, window, cu_seqlens, 40)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 80), torch.float32)
    gradients = cuda.backward(o, q, k, k, o, lse, 0.125, window, cu_seqlens, 40)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (q, k, k)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fast"}, "backend='fast' is unknown; choose one of auto, flash"),
        ({"window": 0}, "window 0"),
        ({"sinks_H": torch.zeros(3)}, "sinks"),
        ({"k_BKTD": torch.zeros(1, 3, 8, 16)}, "multiple of K"),
        ({"v_BKTD": torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)}, "dtypes"),
        ({"documents": locate_documents(torch.zeros(1, 7))}, r"document_ids_BT has shape \(1, 7\); need \(1, 8\)"),
    ],
)
def test_mistakes_are_named(change, message):
    (q, k, v, sinks), _ = make_inputs(1, 8, 4, 2, 16)
    arguments = {"q_BHTD": q, "k_BKTD": k, "v_BKTD": v, "sinks_H": sinks, **change}
    with pytest.raises(ValueError, match=message):
        sink_attention(**arguments)


@pytest.mark.parametrize(
    "dtype, head_dim, expected",
    [
        (torch.bfloat16, 64, "flash"),
        (torch.float16, 256, "flash"),
        (torch.float32, 64, "chunked"),
        (torch.bfloat16, 60, "chunked"),
        (torch.bfloat16, 264, "chunked"),
    ],
)
def test_what_auto_takes_on_cuda(dtype, head_dim, expected, monkeypatch):
    """Without a GPU: the table is asked about one."""

    def chosen(device):
        return choose(BACKENDS, "auto", AUTO_ORDER, dtype, (head_dim,), torch.device(device)).name

    for capability, name in (((9, 0), expected), ((7, 5), "chunked")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert chosen("cuda") == name
    assert chosen("cpu") == "flash" and chosen("meta") == expected  # which stands for CUDA


def test_where_documents_lie():
    """Ids of any values and gaps; sequences never share a document; an id that comes back is a mistake."""
    documents = locate_documents(torch.tensor([[-3, -3, -3, 5, 5, 9], [9, 9, 9, 9, 9, 9]]))
    assert documents.first_BT.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6]
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 12] and documents.longest == 6
    assert (documents.first_BT.dtype, documents.cu_seqlens.dtype) == (torch.int64, torch.int32)
    with HostReadWatch("cpu") as watch:
        single = locate_documents(torch.tensor([[7], [7]]))
    assert watch.calls == ["tolist"]  # the host waits once
    assert single.cu_seqlens.tolist() == [0, 1, 2] and single.longest == 1
    with pytest.raises(ValueError, match=r"document_ids_BT has shape \(8,\)"):
        locate_documents(torch.zeros(8))
    with pytest.raises(ValueError, match="decreases"):
        locate_documents(torch.tensor([[1, 1, 0, 0]]))


def test_documents_of_many_runs_are_located_at_once():
    """Runs that begin and end within documents, between them, and overlap: as if each were a batch of its own."""
    ids = torch.tensor([[-3, -3, -3, 5, 5, 9, 9, 11], [9, 9, 9, 9, 9, 9, 10, 10]])
    runs = [(0, 8), (0, 5), (3, 8), (2, 4), (7, 8), (1, 7)]
    with HostReadWatch("cpu") as watch:
        first, found = locate_documents_of_runs(ids, runs)
    assert watch.calls == ["tolist"]  # the host waits once
    assert torch.equal(first, locate_documents(ids).first_BT)
    for (start, stop), documents in zip(runs, found, strict=True):
        alone = locate_documents(ids[:, start:stop])
        assert torch.equal(documents.first_BT, alone.first_BT) and documents.longest == alone.longest
        assert torch.equal(documents.cu_seqlens, alone.cu_seqlens) and documents.first_BT.is_contiguous()
    with pytest.raises(ValueError, match="decreases"):  # between two runs
        locate_documents_of_runs(torch.tensor([[1, 1, 0, 0]]), [(0, 2), (2, 4)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129])
@pytest.mark.parametrize("backend, dtype", [("flash", torch.bfloat16), ("chunked", torch.float32)])
@pytest.mark.parametrize("T, H, K, D", [(1, 8, 1, 64), (300, 8, 2, 64), (513, 4, 4, 32)])
def test_cuda_equals_reference(T, H, K, D, backend, dtype, window, documents):
    inputs, do = make_inputs(2, T, H, K, D, dtype=dtype, device="cuda")
    ids = None
    if documents:
        ids = torch.stack([packed_ids([1, 130][: T // 200], T), packed_ids([min(T, 7) - 1], T)]).cuda()
    kwargs = {"window": window, "documents": located(ids)}
    exact = run([x.double() for x in inputs], do.double(), backend="reference", **kwargs)
    assert_close(run(inputs, do, backend=backend, **kwargs), exact, 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_auto_takes_flash_for_bfloat16_and_chunked_for_float32():
    for dtype, backend in ((torch.bfloat16, "flash"), (torch.float32, "chunked")):
        inputs, _ = make_inputs(1, 200, 4, 2, 64, dtype=dtype, device="cuda")
        assert torch.equal(sink_attention(*inputs), sink_attention(*inputs, backend=backend))
    with pytest.raises(ValueError, match="backend='flash' computes in bf16 or fp16 on CUDA"):
        sink_attention(*inputs, backend="flash")
