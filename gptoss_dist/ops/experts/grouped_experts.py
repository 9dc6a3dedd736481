"""The expert MLPs of a mixture of experts, for rows that are already sorted by expert.

    gate, up = deinterleave(x @ gate_up_proj[e] + gate_up_proj_bias[e])
    y        = act(gate, up) @ down_proj[e] + down_proj_bias[e]

Every back end computes this function and its gradients:

- `loop` takes one expert at a time under plain autograd. It is the reference, and needs the row counts on the host.
- `grouped_mm` is for CUDA: two grouped products of torch (`torch.nn.functional.grouped_mm`), and no host
  synchronisation of ours. Torch has a kernel for bf16 on compute capabilities 9 and 10; elsewhere each product reads
  on the host where rows end (docs/cuda_trace.md).
- `grouped_gemm` is the same with the products of the package of that name (https://github.com/tgale96/grouped_gemm),
  for bf16 on CUDA. It has to be asked for: it reads the row counts on the host, once per call.
- `blocked` is for the CPU: a hand-written forward and backward pass.

Shapes: N rows (token copies) of all experts, E experts, D hidden size, I intermediate size, F = 2 * I.
"""

from torch import Tensor

from gptoss_dist.ops.backends import Backend, choose, serves_all, table
from gptoss_dist.ops.experts.activation import gating_of
from gptoss_dist.ops.experts.cpu_blocked import blocked_experts
from gptoss_dist.ops.experts.grouped import (
    grouped_gemm_experts,
    grouped_mm_experts,
    why_not_grouped_gemm,
    why_not_grouped_mm,
)
from gptoss_dist.ops.experts.loop import loop_experts

BACKENDS = table(
    Backend("grouped_mm", why_not_grouped_mm, grouped_mm_experts),
    Backend("grouped_gemm", why_not_grouped_gemm, grouped_gemm_experts),
    Backend("loop", serves_all, loop_experts),
    Backend("blocked", serves_all, blocked_experts),
)
"""Sizes are (D, I). `run` takes tokens_per_expert_E, the activation's `Gating`, and (x_ND, gate_up_proj_EDF,
gate_up_proj_bias_EF or None, down_proj_EID, down_proj_bias_ED or None); it returns y_ND."""

AUTO_ORDER = {"cpu": ("blocked",), "cuda": ("grouped_mm", "loop")}
"""What `auto` tries, by type of device; other devices are like CUDA."""


def grouped_experts(
    x_ND: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_proj_EDF: Tensor,
    gate_up_proj_bias_EF: Tensor | None,
    down_proj_EID: Tensor,
    down_proj_bias_ED: Tensor | None,
    *,
    activation: str,
    alpha: float = 1.702,
    limit: float = 7.0,
    backend: str = "auto",
) -> Tensor:
    """Apply the MLP of each expert to its rows.

    In bf16 and fp16 the result of each matrix product is rounded before its bias is added, as in the Hugging Face
    model: a fused addition is more exact, but moves pre-activations across the clamp. The activation is evaluated in
    fp32 and rounded once, save by `loop`, which rounds after every operation.

    Args:
        x_ND: Rows sorted by expert, of any floating dtype.
        tokens_per_expert_E: How many consecutive rows each expert has, integers that sum to N. An expert may have none:
            its gradients are exact zeros.
        gate_up_proj_EDF: Weights in Hugging Face's layout, gate in the even and up in the odd columns.
        gate_up_proj_bias_EF: Biases, or None.
        down_proj_EID: Weights.
        down_proj_bias_ED: Biases, or None.
        activation: `gpt_oss` (clamped SwiGLU of the GPT-OSS reference, with `alpha` and `limit`) or `silu`
            (silu(gate) * up, which ignores both).
        alpha: Factor within the sigmoid.
        limit: Where gate and up are clamped.
        backend: `auto`, or a name in `BACKENDS`; this file's docstring tells them apart. `auto` is `blocked` on CPU,
            and elsewhere `grouped_mm` if it can serve, else `loop`.

    Returns:
        y_ND, in x's dtype.

    Raises:
        ValueError: A name is unknown, shapes or dtypes do not fit, row counts do not sum to N (`grouped_mm` does not
            look, because it would have to wait for the device), or the back end cannot serve.
    """
    _check_operands(x_ND, tokens_per_expert_E, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    gating = gating_of(activation, alpha, limit)
    operands = (x_ND, gate_up_proj_EDF, gate_up_proj_bias_EF, down_proj_EID, down_proj_bias_ED)
    order = AUTO_ORDER.get(x_ND.device.type, AUTO_ORDER["cuda"])
    I, D = down_proj_EID.shape[1:]  # noqa: E741
    chosen = choose(BACKENDS, backend, order, x_ND.dtype, (D, I), x_ND.device)
    return chosen.run(tokens_per_expert_E, gating, operands)


def _check_operands(x_ND, tokens_E, w1_EDF, b1_EF, w2_EID, b2_ED) -> None:
    E, D, twice_I = w1_EDF.shape
    expected = {
        "x": (x_ND, (x_ND.shape[0], D)),
        "gate_up_proj_bias": (b1_EF, (E, twice_I)),
        "down_proj": (w2_EID, (E, twice_I // 2, D)),
        "down_proj_bias": (b2_ED, (E, D)),
        "tokens_per_expert": (tokens_E, (E,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; gate_up_proj {tuple(w1_EDF.shape)} asks for {shape}"
            )
    for name, tensor in (
        ("gate_up_proj", w1_EDF),
        ("gate_up_proj_bias", b1_EF),
        ("down_proj", w2_EID),
        ("down_proj_bias", b2_ED),
    ):
        if tensor is not None and tensor.dtype != x_ND.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but x is {x_ND.dtype}; cast the parameters to the compute dtype first"
            )
