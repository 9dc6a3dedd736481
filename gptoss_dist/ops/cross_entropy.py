"""Cross entropy of a linear head that never holds the logits of all tokens.

`chunked` takes the tokens a few hundred at a time and, while a chunk's probabilities are at hand, already computes
that chunk's gradients: `d_logits = softmax(logits) - onehot(label)` needs nothing from later layers but a scalar
factor, which backward applies. So the head costs its three GEMMs and one fp32 softmax, and no logits survive the
forward pass. The idea is Liger Kernel's fused linear cross entropy (Hsu et al., arXiv:2410.10989); compare Cut
Cross-Entropy (Wijmans et al., arXiv:2411.09009), which recomputes the logits in backward instead.

Shapes: N tokens, C tokens of one chunk, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptoss_dist.ops.backends import Backend, choose, serves_all, table
from gptoss_dist.ops.gemm import gemm_dtype

# Elements of a 16-bit weight gradient product awaiting its addition in fp32: in cache on the CPU, elsewhere merely
# bounded (128 MiB).
_PRODUCT_ELEMENTS_CPU = 1 << 19
_PRODUCT_ELEMENTS = 1 << 26


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
    chunk_tokens: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the sum over tokens of -log softmax(hidden @ weight.T + bias)[label], in nats; the caller divides.

    With `chunked`, gradients are ready after the forward pass and kept until the backward pass (hidden's, and weight's
    in fp32 whatever its dtype, so that chunks do not round away each other's contributions): do not place it under
    activation checkpointing, which would compute them twice. The logits of 16-bit operands are rounded to 16 bits, as
    `F.linear` does, and so is their gradient, save where bf16 is multiplied in fp32 (`ops/gemm.py`): there both stay in
    fp32. Softmax, loss and the label's subtraction are in fp32.

    Args:
        hidden_ND: Final hidden states, of any floating dtype.
        weight_VD: The head's weight, of the same dtype.
        labels_N: The token to predict, int64.
        ignore_index: Tokens with this label carry neither loss nor gradient.
        backend: `reference` is `F.cross_entropy` on all N x V logits (in fp32), under plain autograd. `chunked` is
            described above; `auto` takes it.
        chunk_tokens: C. The default is D, within 512 and 4096: a chunk's C x V logits take no more room than the V x D
            weight (if D is not below 512), and reading and writing the weight's gradient once per chunk stays cheap
            beside the chunk's matrix products.
        bias: The head's bias, [V] of the same dtype, or None.

    Returns:
        An fp32 scalar.

    Raises:
        ValueError: Shapes or dtypes do not fit, `chunk_tokens` is below 1, or the back end is unknown.
        IndexError: On CPU, where looking is free, a label is outside of [0, V) and not `ignore_index`.
    """
    _check_operands(hidden_ND, weight_VD, labels_N, bias)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    chosen = choose(BACKENDS, backend, ("chunked",), hidden_ND.dtype, (), hidden_ND.device)
    return chosen.run(hidden_ND, weight_VD, bias, labels_N, ignore_index, chunk_tokens)


@torch.no_grad()
def linear_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token instead of their sum, without a gradient; only tokens with a label are computed.

    Args:
        hidden_ND: Final hidden states, of any floating dtype.
        weight_VD: The head's weight, of the same dtype.
        labels_N: The token to predict, int64.
        ignore_index: Tokens with this label have the loss 0.

    Returns:
        -log softmax(hidden @ weight.T)[label] in nats, fp32 [N], and whether the label has the largest logit, bool [N].

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    _check_operands(hidden_ND, weight_VD, labels_N, None)
    losses_N = torch.zeros(labels_N.shape, device=labels_N.device)
    greedy_N = torch.zeros(labels_N.shape, dtype=torch.bool, device=labels_N.device)
    labelled = (labels_N != ignore_index).nonzero()[:, 0]
    dtype = gemm_dtype(hidden_ND, rows=len(labelled))
    weight_DV = weight_VD.to(dtype).t()
    for index_C in labelled.split(_chunk_tokens(hidden_ND)):
        labels_C1 = labels_N[index_C, None]
        logits_CV = _upcast(hidden_ND[index_C].to(dtype) @ weight_DV)
        losses_N[index_C] = (logits_CV.logsumexp(-1) - logits_CV.gather(1, labels_C1)[:, 0]).float()
        greedy_N[index_C] = logits_CV.argmax(-1) == labels_C1[:, 0]
    return losses_N, greedy_N


def _reference(hidden_ND, weight_VD, bias_V, labels_N, ignore_index: int, chunk_tokens: int | None) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    return F.cross_entropy(_upcast(logits_NV), labels_N, ignore_index=ignore_index, reduction="sum").float()


def _chunked(hidden_ND, weight_VD, bias_V, labels_N, ignore_index: int, chunk_tokens: int | None) -> Tensor:
    if labels_N.device.type == "cpu":
        # Free to look at the labels here; on an accelerator it would stall the queue.
        keep_N = labels_N != ignore_index
        if not keep_N.all():
            hidden_ND, labels_N = hidden_ND[keep_N], labels_N[keep_N]
        if labels_N.numel() and not 0 <= labels_N.min() <= labels_N.max() < weight_VD.shape[0]:
            raise IndexError(
                f"labels span [{labels_N.min()}, {labels_N.max()}] but the vocabulary has {weight_VD.shape[0]} entries"
            )
    needs_grad = torch.is_grad_enabled()
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden_ND)
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, ignore_index, chunk_tokens, needs_grad)


BACKENDS = table(Backend("chunked", serves_all, _chunked), Backend("reference", serves_all, _reference))
"""`run` takes hidden_ND, weight_VD, bias_V or None, labels_N, ignore_index, and chunk_tokens or None."""


def _check_operands(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias: Tensor | None) -> None:
    if hidden_ND.dim() != 2 or labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)} and labels {tuple(labels_N.shape)} must be [N, D] and [N]; flatten them"
        )
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_ND.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight_VD.shape)}; hidden size {hidden_ND.shape[1]} must be its second"
        )
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; the vocabulary asks for ({weight_VD.shape[0]},)")
    for name, tensor in (("weight", weight_VD), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_ND.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but hidden is {hidden_ND.dtype}; cast one of them first")


def _chunk_tokens(hidden_ND: Tensor) -> int:
    return min(max(hidden_ND.shape[1], 512), 4096)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(tokens: int, size: int) -> list[slice]:
    """Return slices of `size` tokens, the last one shorter, that cover all of them."""
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _softmax_(logits_CV: Tensor) -> Tensor:
    """Return the softmax over V, on the CPU in place: its kernel finishes reading a row before writing it."""
    on_cpu = logits_CV.device.type == "cpu"
    return torch.softmax(logits_CV, -1, out=logits_CV) if on_cpu else torch.softmax(logits_CV, -1)


def _add_weight_gradient(d_weight_VD: Tensor, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add d_logits.T @ hidden to d_weight; 16-bit products in fp32, by blocks of rows, which bounds their room."""
    if d_weight_VD.dtype == d_logits_CV.dtype:
        d_weight_VD.addmm_(d_logits_CV.t(), hidden_CD)
        return
    limit = _PRODUCT_ELEMENTS_CPU if d_weight_VD.device.type == "cpu" else _PRODUCT_ELEMENTS
    rows = max(1, limit // hidden_CD.shape[1])
    for d_weight_BD, d_logits_CB in zip(d_weight_VD.split(rows), d_logits_CV.split(rows, dim=1)):
        d_weight_BD += d_logits_CB.t() @ hidden_CD


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, bias_V, labels_N, ignore_index: int, chunk_tokens: int, needs_grad: bool
    ) -> Tensor:
        (N, D), V = hidden_ND.shape, weight_VD.shape[0]
        need_hidden, need_weight, need_bias = (needs_grad and needed for needed in ctx.needs_input_grad[:3])
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        ctx.dtype, dtype = hidden_ND.dtype, gemm_dtype(hidden_ND, rows=N)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if need_hidden else None
        d_weight_VD = weight_VD.new_zeros((V, D), dtype=exact) if need_weight else None
        d_bias_V = weight_VD.new_zeros(V, dtype=exact) if need_bias else None
        loss = hidden_ND.new_zeros((), dtype=exact)

        # One buffer of logits serves all chunks; 16-bit products need a second one for the fp32 arithmetic in between.
        rows, rounded = min(chunk_tokens, N), dtype != exact
        logits_buffer = hidden_ND.new_empty(rows, V)
        exact_buffer = hidden_ND.new_empty(rows, V, dtype=exact) if rounded else logits_buffer
        for chunk in _chunks(N, chunk_tokens):
            hidden_CD, labels_C1 = hidden_ND[chunk], labels_N[chunk, None]
            ignored_C1 = labels_C1 == ignore_index
            labels_C1 = labels_C1.masked_fill(ignored_C1, 0)
            rounded_CV, logits_CV = logits_buffer[: len(hidden_CD)], exact_buffer[: len(hidden_CD)]

            torch.mm(hidden_CD, weight_VD.t(), out=rounded_CV)
            if bias_V is not None:
                rounded_CV.add_(bias_V)
            if rounded:
                logits_CV.copy_(rounded_CV)
            max_C1, label_logit_C1 = logits_CV.amax(-1, keepdim=True), logits_CV.gather(1, labels_C1)
            probs_CV = _softmax_(logits_CV)
            # log-sum-exp from the likeliest token, whose probability is at least 1/V: no second pass of exponentials,
            # and unlike in log(probs[label]) nothing underflows.
            losses_C1 = max_C1 - probs_CV.amax(-1, keepdim=True).log_() - label_logit_C1
            loss += losses_C1.masked_fill_(ignored_C1, 0).sum()
            if d_hidden_ND is None and d_weight_VD is None and d_bias_V is None:
                continue

            d_logits_CV = probs_CV.scatter_add_(1, labels_C1, probs_CV.new_full((), -1.0).expand_as(labels_C1))
            if rounded:
                d_logits_CV = rounded_CV.copy_(d_logits_CV)
            # Ignored tokens are masked at width D, not V: in d_hidden directly, in d_weight through rows of hidden.
            if d_hidden_ND is not None:
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_ND[chunk]).masked_fill_(ignored_C1, 0)
            if d_weight_VD is not None:
                _add_weight_gradient(d_weight_VD, d_logits_CV, hidden_CD.masked_fill(ignored_C1, 0))
            if d_bias_V is not None:
                d_bias_V += d_logits_CV.t() @ (~ignored_C1[:, 0]).to(d_logits_CV.dtype)

        ctx.save_for_backward(d_hidden_ND, d_weight_VD, d_bias_V)
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor):
        # Reading the factor on the host is free on the CPU only; it is 1 where the caller scales later or not at all.
        unscaled = d_loss.device.type == "cpu" and d_loss.item() == 1.0
        grads = []
        for saved in ctx.saved_tensors:
            grads.append(saved if saved is None or unscaled else saved * d_loss)
        return *(g if g is None else g.to(ctx.dtype) for g in grads), None, None, None, None
