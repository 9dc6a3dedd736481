"""Verdicts: chance alone seldom makes one, real differences are found, and the noise is named for what it is."""

import zlib
from dataclasses import replace

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.command import CompareOptions, analyse
from gptoss_dist.tracking.comparing.differences import differences, doubts, labels, replicas
from gptoss_dist.tracking.comparing.equal import equal_table
from gptoss_dist.tracking.comparing.rendering import markdown
from gptoss_dist.tracking.comparing.runs import ComparedRun, Series, with_own_names
from gptoss_dist.tracking.comparing.summary import summarize
from gptoss_dist.tracking.comparing.verdicts import judge_training, judge_validation, sentences, t_quantile
from tests.support.recorded_runs import law, noise


def made_up(name, *, lr="0.001", seed=0, shift=0.0, std=0.02, batches=None, steps=200, correlation=0.0, **config):
    """A run in memory; `batches` is the seed of its noise."""
    steps_N = np.arange(1, steps + 1)
    tokens = 4096.0 * steps_N
    losses = (
        law(tokens) + shift + noise(steps, std, zlib.crc32(name.encode()) if batches is None else batches, correlation)
    )
    rows = np.arange(steps)
    series = {"loss/train": Series(rows, losses), "loss/val": Series(rows[49::50], law(tokens[49::50]) + shift)}
    return ComparedRun(
        name=name,
        source=f"runs/{name}",
        config={"optim.lr": lr, "run.seed": str(seed), "run.name": name, "model.vocab_size": "512"} | config,
        tags={},
        dataset={"digest": "d"},
        status="FINISHED",
        steps=steps_N,
        axes={"tokens": tokens, "exaflops": tokens * 1e-9, "hours": steps_N / 400},
        series=series,
    )


def judged(runs, axis="tokens"):
    groups = replicas(runs)
    return judge_training(runs, groups, labels(runs, groups), equal_table(runs, axis, []))


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_chance_alone_seldom_shows_a_difference(correlation):
    """Four runs of different settings and the same loss: in at most about 5 % is the best one `better`."""
    wrong = 0
    for trial in range(150):
        runs = [
            made_up(str(n), lr=f"0.00{n}", batches=10 * trial + n, correlation=correlation, steps=120)
            for n in range(1, 5)
        ]
        wrong += any(verdict.is_shown for verdict in judged(runs).verdicts)
    assert wrong <= 10, wrong


def test_chance_alone_seldom_shows_a_difference_between_replicas():
    """With an effect of the seed that is far more than the noise within a run."""
    random = np.random.default_rng(0)
    wrong = without_seeds = 0
    for trial in range(150):
        runs = [
            made_up(
                f"{lr}-{seed}",
                lr=f"0.00{lr}",
                seed=seed,
                shift=random.normal(0, 0.05),
                std=0.01,
                batches=trial * 100 + lr * 10 + seed,
                steps=60,
            )
            for lr in (1, 2, 3)
            for seed in (0, 1)
        ]
        wrong += any(verdict.is_shown for verdict in judged(runs).verdicts)
        without_seeds += any(verdict.is_shown for verdict in judged(runs[::2]).verdicts)
    assert wrong <= 10, wrong
    assert without_seeds > 75, "the trial would not tell a judgement that ignores seeds from one that knows them"


def test_a_real_difference_is_found_and_said_plainly():
    runs = [made_up("a", lr="0.001"), made_up("b", lr="0.002", shift=-0.12), made_up("c", lr="0.004", shift=-0.1201)]
    judgement = judged(runs)
    near, far = judgement.verdicts
    assert not near.is_shown and str(near).startswith("No difference shown between c (lr 0.004) and b (lr 0.002) at")
    assert far.is_shown and far.worse == "a (lr 0.001)" and far.difference == pytest.approx(0.12, abs=0.03)
    assert str(far).endswith("nats at 819.2k tokens.") and " is better than a (lr 0.001) by 0.1" in str(far)
    assert "does not contain what another seed would change" in judgement.noise and judgement.noise_std is None


def test_replicas_give_the_noise():
    shifts = {(1, 0): 0.03, (1, 1): -0.03, (2, 0): -0.5, (2, 1): -0.44}
    runs = [
        made_up(f"{lr}-{seed}", lr=f"0.00{lr}", seed=seed, shift=shift, std=1e-4)
        for (lr, seed), shift in shifts.items()
    ]
    judgement = judged(runs)
    (verdict,) = judgement.verdicts
    assert verdict.difference == pytest.approx(0.47, abs=0.001)
    assert judgement.noise_std == pytest.approx(0.06 / np.sqrt(2), abs=0.001)
    assert "n = 4 runs of 2 configurations, 2 degrees of freedom" in judgement.noise
    assert verdict.half_width == pytest.approx(4.303 * judgement.noise_std, rel=0.01)  # t of 2 degrees, sqrt(1/2 + 1/2)
    validated = judge_validation(
        runs, replicas(runs), ["lr 0.001", "lr 0.002"], equal_table(runs, "tokens", []), "loss/val"
    )
    assert validated.verdicts[0].difference == pytest.approx(0.47, abs=0.001)
    text = markdown(analyse(runs, [summarize(run) for run in runs], CompareOptions(runs=["a", "b"])))
    assert all(f"\n{what}: ± is a 95 % interval" in text for what in ("loss/train over tokens", "loss/val over tokens"))
    assert judge_validation(runs, [[0], [2]], ["a", "b"], equal_table(runs, "tokens", []), "loss/val") is None


def test_a_run_that_was_repeated_is_one_replica():
    """Three runs of one seed, alike to the last digit, say nothing of what another seed would do."""
    shifts = [("1", 0, 0.3), ("1", 0, 0.3), ("1", 0, 0.3), ("1", 1, 0.0), ("2", 0, -0.2), ("2", 1, 0.0)]
    runs = [
        made_up(f"{n}", lr=f"0.00{lr}", seed=seed, shift=shift, std=1e-5) for n, (lr, seed, shift) in enumerate(shifts)
    ]
    (verdict,), once = judged(runs).verdicts, judged(runs[2:]).verdicts[0]
    assert verdict.difference == pytest.approx(0.25, abs=0.001)
    assert verdict.half_width == pytest.approx(once.half_width, rel=0.01) and not verdict.is_shown


def test_replicas_without_a_loss_there_are_named():
    """Else the mean of a group would be that of the runs that did not diverge."""
    runs = [made_up(f"{lr}-{seed}", lr=f"0.00{lr}", seed=seed) for lr in (1, 2) for seed in (0, 1)]
    runs[3].series["loss/train"].values[60:] = np.nan
    groups = replicas(runs)
    judgement = judge_training(runs, groups, labels(runs, groups), equal_table(runs, "tokens", []))
    assert judgement.verdicts[0].without == ["2-1"] and "Not in the means: 2-1, which" in str(judgement.verdicts[0])


def test_runs_of_one_seed_are_compared_with_each_other():
    """Each seed has a level of its own, far more than what the settings differ by."""
    shifts = {"1": [0.0, 0.3, -0.2], "2": [0.05, 0.35, -0.15], "3": [0.101, 0.399, -0.1]}
    runs = [
        made_up(f"{lr}-{seed}", lr=f"0.00{lr}", seed=seed, shift=shift, std=1e-5)
        for lr, row in shifts.items()
        for seed, shift in enumerate(row)
    ]
    judgement = judged(runs)
    assert [verdict.worse for verdict in judgement.verdicts] == ["lr 0.002 (3 runs)", "lr 0.003 (3 runs)"]
    assert all(verdict.is_shown for verdict in judgement.verdicts)
    assert judgement.noise_std == pytest.approx(0.25, abs=0.01) and "once each seed's own level" in judgement.noise
    one_less = judged(runs[:-1])  # not the same seeds any more
    assert not any(verdict.is_shown for verdict in one_less.verdicts) and "own level" not in one_less.noise


def test_the_same_batches_make_small_differences_visible():
    """Runs that share the scatter of their batches differ by less than it."""
    runs = [made_up("a", batches=7), made_up("b", lr="0.002", shift=-0.004, batches=7)]
    assert judged(runs).verdicts[0].is_shown
    runs = [made_up("a", batches=7), made_up("b", lr="0.002", shift=-0.004, batches=8)]
    assert not judged(runs).verdicts[0].is_shown


def test_a_run_that_did_not_get_there_is_not_judged():
    runs = [made_up("a"), made_up("b", lr="0.002", steps=100), made_up("c", lr="0.003")]
    groups = replicas(runs)
    table = equal_table(runs, "tokens", [4096.0 * 150])
    judgement = judge_training(runs, groups, labels(runs, groups), table)
    assert [sorted((v.better, v.worse)) for v in judgement.verdicts] == [["a (lr 0.001)", "c (lr 0.003)"]]
    assert sentences(judgement)[-1] == "Not judged: b (lr 0.002), without a loss at 614.4k tokens."
    assert judge_training(runs[:2], groups[:2], ["a", "b"], equal_table(runs[:2], "tokens", [4096.0 * 150])) is None


def test_of_many_runs_those_within_the_noise_share_a_sentence():
    runs = [made_up(f"r{n:02}", lr=f"{n}", shift=0.0 if n < 12 else 0.5) for n in range(20)]
    said = sentences(judged(runs))
    assert len(said) == 3 and "has the lowest loss" in said[0] and "No difference shown" in said[1]
    assert "It is better than" in said[2] and "8" in said[2]


def test_what_differs_is_named_once():
    runs = [made_up("a"), made_up("b", lr="0.002", seed=3)]
    assert {one.key: one.values for one in differences(runs)} == {
        "optim.lr": ["0.001", "0.002"],
        "run.seed": ["0", "3"],
    }
    assert replicas([*runs, made_up("c", seed=5)]) == [[0, 2], [1]]
    far = [made_up(name, **{"data.path": f"{'x' * 50}{name}{'y' * 50}"}) for name in "ab"]
    text = markdown(analyse(far, [summarize(run) for run in far], CompareOptions(runs=["a", "b"])))
    assert all(run.config["data.path"] in text for run in far), "what was cut would look the same"
    many = [made_up("a", **{"x.a": "1", "x.b": "1"}), made_up("b", lr="0.002", **{"x.a": "2", "x.b": "2"})]
    assert labels(many, replicas(many)) == ["a", "b"]


def test_losses_that_cannot_be_compared_are_not():
    for other in (made_up("b", **{"model.vocab_size": "1024"}), made_up("b")):
        if other.config["model.vocab_size"] == "512":
            other.dataset["digest"] = "e"
        (doubt,) = doubts([made_up("a"), other])
        assert doubt.spoils_losses and "bits per byte" in doubt.text and "not comparable" in doubt.text
    assert not doubts([made_up("a"), made_up("b")])
    (doubt,) = doubts([made_up("a", **{"validation.samples": "8"}), made_up("b", **{"validation.samples": "9"})])
    assert "other samples" in doubt.text
    (doubt,) = doubts([made_up("a"), replace(made_up("b"), changed=["checkpoint.dir", "optim.lr"])])
    assert not doubt.spoils_losses and doubt.text.startswith("b went on with other settings after a resume (optim.lr)")
    (doubt,) = doubts([made_up("a", **{"train.steps": "10"}), made_up("b", **{"train.steps": "20"})])
    assert not doubt.spoils_losses and "schedules" in doubt.text


def test_runs_of_one_name_get_names_of_their_own():
    runs = [made_up("x"), made_up("x"), made_up("y")]
    assert [run.name for run in with_own_names(runs)] == ["runs/x", "runs/x (2)", "y"]
    runs = [replace(made_up(name), source=name) for name in ("a", "a", "a (2)")]
    assert [run.name for run in with_own_names(runs)] == ["a", "a (3)", "a (2)"]


def test_quantiles_are_those_of_tables():
    """Of Student's t: M. Abramowitz and I. Stegun, Handbook of Mathematical Functions, table 26.10, and scipy's."""
    from scipy.special import stdtrit

    assert t_quantile(0.975, 3) == pytest.approx(3.182, abs=5e-4) and t_quantile(0.995, 10) == pytest.approx(
        3.169, abs=5e-4
    )
    for freedom in (1, 1.5, 2, 3.7, 14.2, 300, 5e4, 1e9):
        for probability in (0.6, 0.9, 0.975, 0.9999, 1 - 1e-7):
            expected = float(stdtrit(min(freedom, 1e7), probability))
            assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-5)
