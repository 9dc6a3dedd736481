"""Benchmarks that measure speed apart from balance: each router's choice of experts is replaced from outside.

The model knows nothing of it. Weights stay the softmax of the router's own logits at the forced experts, so that the
router is trained, but nothing useful is learned. Evaluation routes as always.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gptoss_dist.model.moe import Router
from gptoss_dist.model.transformer import GptOss


def force_routing(model: GptOss, how: Literal["balanced", "replay"]) -> list[ForcedRouting]:
    """Replace the choice of experts of every layer of `model`, in place; see `ForcedRouting`."""
    return [ForcedRouting(layer.mlp.router, how) for layer in model.blocks]


class ForcedRouting:
    """A stand-in for `Router.choose` of one router.

    `balanced` gives token t the experts (t K + k) mod E. `replay` repeats the choices of the first batch, until a batch
    has another number of tokens.
    """

    def __init__(self, router: Router, how: Literal["balanced", "replay"]) -> None:
        """Take over the choice of `router`.

        Raises:
            ValueError: `how` is neither `balanced` nor `replay`.
        """
        if how not in ("balanced", "replay"):
            raise ValueError(f"routing cannot be forced to be {how!r}; choose balanced or replay")
        self.router, self.how = router, how
        self.learned_choice = router.choose
        self.recorded_TK: Tensor | None = None
        router.choose = self  # type: ignore[method-assign]

    @property
    def is_recording(self) -> bool:
        """Whether the next forward pass of training records what later ones repeat.

        Let such a step of a compiled model run under `torch.compiler.set_stance("force_eager")`: recording breaks the
        graph, and the break would stay.
        """
        return self.how == "replay" and self.recorded_TK is None

    def __call__(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Router.choose` returns, for the forced experts."""
        if not self.router.training:
            return self.learned_choice(logits_TE)
        (T, E), K = logits_TE.shape, self.router.num_experts_per_tok
        if self.how == "balanced":
            indices_TK = torch.arange(T * K, device=logits_TE.device).view(T, K) % E
        else:
            indices_TK = self._repeated(logits_TE)
        return logits_TE.gather(-1, indices_TK), indices_TK

    def _repeated(self, logits_TE: Tensor) -> Tensor:
        if self.recorded_TK is None or self.recorded_TK.shape[0] != logits_TE.shape[0]:
            self._record(logits_TE.detach())
        assert self.recorded_TK is not None
        return self.recorded_TK

    @torch.compiler.disable
    def _record(self, logits_TE: Tensor) -> None:
        # Not compiled: a tensor that outlives the step must not lie in the memory of a CUDA graph.
        self.recorded_TK = self.learned_choice(logits_TE)[1]
