"""How a token is chosen: the settings, and their ranges, which others take from here (`ranged_like`)."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.command_line import check_ranges, ranged


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. What is out of range, or nan, is refused by its name.

    Limits far beyond any use keep scaled logits finite in float32: else broken weights would be blamed for them.
    """

    temperature: float = ranged(1.0, at_least=0, at_most=1_000_000)
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = ranged(0, at_least=0)
    """Sample from the k most likely tokens; 0 is all."""
    top_p: float = ranged(1.0, above=0, at_most=1)
    """Sample from the smallest set of tokens with this much probability (nucleus, arXiv:1904.09751)."""
    min_p: float = ranged(0.0, at_least=0, at_most=1)
    """Sample from tokens with at least this share of the likeliest one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = ranged(1.0, at_least=1e-6, at_most=1_000_000)
    """Makes tokens of the prompt and of what was written less likely, if above 1 (CTRL, arXiv:1909.05858)."""

    def __post_init__(self) -> None:
        check_ranges(self)


PLAIN = Sampling()
"""By the probabilities of the model."""
GREEDY = Sampling(temperature=0.0)
"""The most likely token, always."""
