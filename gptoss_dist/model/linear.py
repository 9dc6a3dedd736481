"""The linear layer of the model: the projections of attention, and the head."""

from torch import Tensor, nn

from gptoss_dist.ops.gemm import linear


class Linear(nn.Linear):
    """`nn.Linear`, fast in bf16 on every CPU (see `ops/gemm.py`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the weight, plus the bias, in x's dtype."""
        return linear(x, self.weight, self.bias)
