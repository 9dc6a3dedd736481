"""Completions by a model that two processes share are those of the plain model, recomputed without a cache."""

import json

import pytest
import torch

from gptoss_dist import GptOss
from gptoss_dist.model.init import initialize
from tests.support.complete_in_ranks import MODEL, NEW, PROMPTS, STOPS
from tests.support.layouts import Case
from tests.support.ranks import run
from tests.support.reference import plain

pytestmark = pytest.mark.distributed


@torch.no_grad()
def recomputed() -> list:
    model = GptOss(Case("", 1, model=MODEL).config().model)
    initialize(model, seed=0)
    found = []
    for prompt in PROMPTS:
        ids, logprobs = list(prompt), []
        for _ in range(NEW):
            logprob_V = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            ids.append(int(logprob_V.argmax()))
            logprobs.append(float(logprob_V.max()))
        found.append([ids[len(prompt) :], logprobs])
    return found


@pytest.mark.parametrize("expert_parallel", [2, 1])
def test_two_processes_write_what_one_recomputes(tmp_path, expert_parallel):
    run("tests/support/complete_in_ranks.py", str(tmp_path), str(expert_parallel), processes=2)
    expected = recomputed()
    assert len({token for ids, _ in expected for token in ids}) > 10
    loss = plain(Case("", 1, model=MODEL).config(), steps=1, samples=2).rows[0][0]
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        for (ids, logprobs), kept, freed in zip(expected, report["kept"], report["freed"]):
            assert kept[0] == ids and freed[0] == ids[:10]
            torch.testing.assert_close(torch.tensor(kept[1]), torch.tensor(logprobs), atol=1e-4, rtol=1e-4)
        # Once for a generation of 4 + 49 passes, instead of once for each of 4 + 9. The root stays gathered either way.
        assert report["sent"]["freed"] > 6 * report["sent"]["kept"] > 0
        own = [ids for ids, _ in expected][rank::2][: 2 - rank]
        ends = [next((at for at, token in enumerate(ids) if token in STOPS), NEW) for ids in own]
        assert report["own"] == [ids[:end] for ids, end in zip(own, ends)] and min(ends) < NEW
        assert report["written"] == [prompt + ids[:10] for prompt, (ids, _) in zip(PROMPTS[:2], expected)]
        assert report["freed again"] == [True, True]
        assert report["loss"] == pytest.approx(loss, rel=1e-5)
