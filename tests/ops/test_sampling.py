"""The choice of a token, against the probabilities that it is to have."""

import pytest
import torch

from gptoss_dist.ops.sampling import penalize_repetition, sample

P = torch.tensor([0.15, 0.5, 0.0, 0.1, 0.25])
N = 4000
GRID = (torch.arange(N, dtype=torch.float64) + 0.5) / N


def frequencies(**settings) -> list[float]:
    """How often each token is chosen over a fine grid of uniform numbers, which is its probability."""
    chosen = sample(P.log().expand(N, -1), settings.pop("temperature", 1.0), uniform_B=GRID, **settings)
    return (chosen.bincount(minlength=5) / N).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.15, 0.5, 0, 0.1, 0.25]),
        ({"temperature": 0.5}, [0.065, 0.725, 0, 0.029, 0.181]),
        ({"top_k": 2}, [0, 0.667, 0, 0, 0.333]),
        ({"top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.76}, [0.167, 0.556, 0, 0, 0.278]),
        ({"min_p": 0.31}, [0, 0.667, 0, 0, 0.333]),
        ({"min_p": 0.29}, [0.167, 0.556, 0, 0, 0.278]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6, "min_p": 0.6}, [0, 1, 0, 0, 0]),
    ],
)
def test_probabilities(settings, expected):
    assert frequencies(**settings) == pytest.approx(expected, abs=1e-3)


def test_no_number_chooses_what_has_no_probability():
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert sample(logits, 1.0, uniform_B=ends).tolist() == [1, 2]
    assert sample(logits, 1.0, top_p=0.999, uniform_B=ends).tolist() == [2, 1]


def test_nan_is_no_choice_and_does_not_spread():
    logits = torch.tensor([[0.0, torch.nan, 0.0], [0.0, 9.0, 0.0]])
    for settings in ({}, {"top_k": 2}, {"top_p": 0.9}):
        for temperature in (0.1, 0.0, 1e-40):
            uniform_B = torch.tensor([0.5, 0.5]).double()
            assert sample(logits, temperature, uniform_B=uniform_B, **settings).tolist() == [-1, 1]
    for broken in (torch.nan, torch.inf, -torch.inf):
        assert [sample(torch.full((1, 3), broken), temperature).tolist() for temperature in (0.0, 1.0)] == [[-1]] * 2


def test_a_penalty_lowers_logits_of_either_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
