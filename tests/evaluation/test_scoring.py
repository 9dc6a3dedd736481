"""Log-likelihoods in batches with shared contexts, against one request at a time and all its logits."""

import random

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.evaluation.scoring import IDLE_PLAIN, IDLE_SHARED, LEAST_SHARED, Request, plan, score
from gptoss_dist.model.init import initialize
from gptoss_dist.ops.cross_entropy import linear_token_losses
from tests.support.ranks import MODEL

CPU = torch.device("cpu")
LENGTHS = (1, 2, LEAST_SHARED, LEAST_SHARED + 1, 20, 20, 47, 60)


@pytest.fixture(scope="module")
def model() -> GptOss:
    """A window of 16 is shorter than most contexts."""
    model = GptOss(ModelConfig(**MODEL | {"initializer_range": 0.3, "num_hidden_layers": 3}))
    initialize(model, seed=0)
    return model.eval()


def requests(seed: int = 0) -> list[Request]:
    """Contexts of all lengths, with one to four continuations of one to nine tokens each, in any order."""
    draw = random.Random(seed)
    found = []
    for context in LENGTHS:
        ids = draw.choices(range(272), k=context)
        for _ in range(draw.randrange(1, 5)):
            counted = draw.randrange(1, 10)
            found.append(Request(ids + draw.choices(range(272), k=counted), counted))
    draw.shuffle(found)
    return found


def by_definition(model: GptOss, request: Request) -> tuple[float, bool]:
    logits = model(torch.tensor([request.ids[:-1]]))[0, -request.counted :]
    labels = torch.tensor(request.ids[-request.counted :])
    chosen = logits.log_softmax(-1).gather(1, labels[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == labels).all())


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 10_000])
@torch.no_grad()
def test_batches_give_what_each_request_gives_by_itself(model, batch_tokens):
    asked = requests()
    shared, plain = plan(asked, batch_tokens)
    assert shared and plain and all(batch.is_shared for batch in shared)
    found = dict(pair for batch in shared + plain for pair in score(model, batch, CPU))
    assert sorted(found) == list(range(len(asked)))
    for index, request in enumerate(asked):
        log_likelihood, is_greedy = by_definition(model, request)
        assert found[index].log_likelihood == pytest.approx(log_likelihood, abs=5e-5)
        assert found[index].is_greedy == is_greedy


@torch.no_grad()
def test_what_is_greedy_is_told_from_what_is_not(model):
    ids = list(range(20))
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    asked = [Request(ids, 3), Request([*ids[:-1], (ids[-1] + 1) % 272], 3), Request(ids[:-1], 2)]
    shared, plain = plan(asked, 100)
    assert len(shared) == 1 and not plain
    assert [result.is_greedy for _, result in sorted(score(model, shared[0], CPU))] == [True, False, True]


def test_a_batch_holds_no_more_than_it_may():
    """A context of 100 tokens with 500 answers is cut, and so is what would copy too many keys."""
    asked = [Request([*range(100), index % 272], 1) for index in range(500)]
    shared, plain = plan(asked, 128)
    assert not plain and len(shared) > 10 and sum(len(batch.rows) for batch in shared) == 500
    assert max(100 * len(batch.rows) for batch in shared) <= 32 * 128
    _, plain = plan([Request([index, *range(9)], 1) for index in range(50)], 40)
    assert {len(batch.rows) for batch in plain} == {4, 2}


@torch.no_grad()
def test_a_process_with_nothing_to_do_computes_as_many_passes(model):
    """Passes are counted, because processes that hold parts of a model wait for each other in each."""
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for batch in (*(batches[0] for batches in plan(requests(), 300)), IDLE_SHARED, IDLE_PLAIN):
        passes.clear()
        score(model, batch, CPU)
        counts.append(len(passes))
    hook.remove()
    assert counts == [2, 1, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_tokens_add_up_to_the_loss(dtype, model):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 24, generator=generator).to(dtype)
    weight = torch.randn(90, 24, generator=generator).to(dtype)
    labels = torch.randint(0, 90, (700,), generator=generator)
    labels[::3] = -100
    losses, is_greedy = linear_token_losses(hidden, weight, labels)
    logits = (hidden.float() @ weight.float().t()).to(dtype).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5)
    assert losses.dtype == torch.float32 and not losses[::3].any() and not is_greedy[::3].any()
    if dtype == torch.float32:
        assert torch.equal(is_greedy, (logits.argmax(-1) == labels))
