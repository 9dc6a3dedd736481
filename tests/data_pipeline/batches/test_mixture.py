"""Mixtures: which source a position draws from, how often, until when, and what a change of mind costs."""

import hashlib
import json

import numpy as np
import pytest

from data_pipeline import (
    MixtureDataset,
    Stage,
    TokenDataset,
    WeightedDataset,
    load_tokenizer,
    open_dataset,
    open_source,
)
from data_pipeline.batches import mixture_plan
from data_pipeline.batches.mixture_changes import differences
from data_pipeline.batches.mixture_plan import BLOCK
from data_pipeline.prepare.pipeline import prepare
from data_pipeline.tools.adopt import adopt
from tests.support.token_data import write_dataset
from tests.support.worked_examples import integers, tables_of

SEQ_LEN = 32


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Three sources of different sizes, and one with another tokenizer."""
    root, found = tmp_path_factory.mktemp("sources"), {}
    for seed, (name, documents) in enumerate({"web": 60, "code": 25, "math": 12, "foreign": 10}.items()):
        tokenizer = load_tokenizer("builtin" if name == "foreign" else "bytes")
        prepare(
            [open_source(f"synthetic:documents={documents},seed={seed}")],
            root / name,
            tokenizer,
            validation_fraction=0.1,
            report=lambda _: None,
        )
        found[name] = root / name
    return found


@pytest.fixture
def source(directories):
    def source(name, weight=None, max_epochs=None, as_name=None):
        dataset = TokenDataset(directories[name], seq_len=SEQ_LEN, seed=3)
        return WeightedDataset(as_name or name, dataset, weight, max_epochs)

    return source


def drawn(mixture, n):
    """Samples of each source before each position up to n, [n + 1, S], by counting."""
    source, _ = mixture.locate(np.arange(mixture.start, mixture.start + n))
    return np.vstack(
        [np.zeros(len(mixture.sources), int), np.cumsum(source[:, None] == range(len(mixture.sources)), 0)]
    )


ODD = ((1, 1, 1), (0.7, 0.2, 0.1), (1e-5, 3.0, 1e-3), (0.333333, 0.5, 0), (97, 2, 1), (None, None, None))


@pytest.mark.parametrize("weights", ODD)
def test_proportions_hold_at_any_prefix(source, weights):
    names = ("web", "code", "math")
    mixture = MixtureDataset([source(name, weight) for name, weight in zip(names, weights)])
    if weights[0] is None:
        weights = [s.dataset.tokens_total for s in mixture.sources]
    share_S, n = np.array(weights) / sum(weights), 2 * BLOCK + 12_345
    drawn_NS, position_N1 = drawn(mixture, n), np.arange(n + 1)[:, None]
    off_NS = drawn_NS - share_S * position_N1
    assert np.abs(off_NS[10_000:] / position_N1[10_000:]).max() < 2e-4  # asked for: 1e-3
    assert np.abs(off_NS).max() < 3.1  # within a sample or so of where it should be, and rounding over two blocks
    # Far beyond what anybody counts: the same, by arithmetic.
    far = 10**13 + 77
    assert np.abs(mixture.counts(far) / far - share_S).max() < 1 / BLOCK and mixture.counts(far).sum() == far
    assert mixture.positions_total is None and np.array_equal(mixture.counts(n), drawn_NS[-1])


def test_many_sources_and_tiny_weights():
    from data_pipeline.batches.mixture_plan import interleave, quantise

    generator = np.random.default_rng(0)
    for S in (2, 5, 40, 300):
        share_S = generator.dirichlet(np.full(S, 0.3))
        counts_S = quantise(share_S)
        assert counts_S.sum() == BLOCK and counts_S.min() >= 1
        source, rank = interleave(counts_S)
        for s in range(S):
            assert np.array_equal(rank[source == s], np.arange(counts_S[s]))
        prefix_LS = np.cumsum(source[:, None] == range(S), axis=0)[10_000:]
        length_L1 = np.arange(10_001, BLOCK + 1)[:, None]
        assert np.abs(prefix_LS / length_L1 - share_S).max() < 1e-3


def test_each_source_is_read_in_its_own_order_from_epoch_to_epoch(source):
    mixture = MixtureDataset([source("web", 0.5), source("math", 0.3), source("code", 0.2)])
    n = 4 * mixture.sources[1].dataset.samples_per_epoch
    positions = np.arange(n)
    which, count = mixture.locate(positions)
    tokens = mixture.samples(positions)
    for s, one in enumerate(mixture.sources):
        assert np.array_equal(count[which == s], np.arange((which == s).sum()))
        assert np.array_equal(tokens[which == s], one.dataset.samples(count[which == s]))
    # A mixture of one is the dataset itself.
    alone = source("web")
    assert np.array_equal(MixtureDataset([alone]).samples(positions), alone.dataset.samples(positions))
    assert mixture.tokenizer.n_vocab == mixture.n_vocab == 265
    used = mixture.usage(n)
    assert [u.samples for u in used] == mixture.counts(n).tolist() and sum(u.share for u in used) == pytest.approx(1)
    assert used[1].epochs == used[1].samples / mixture.sources[1].dataset.samples_per_epoch
    assert used[0].tokens == used[0].samples * SEQ_LEN


@pytest.mark.parametrize("packing", ["contiguous", "best_fit", "varlen"])
def test_a_micro_batch_holds_the_samples_of_its_sources(tmp_path, packing):
    """Whatever their files: ids of 2 and of 4 bytes, in shards of which a sample needs up to four."""
    paths = [tmp_path / name for name in ("a", "b", "raw")]
    for seed, path in enumerate(paths):
        path.mkdir()
        write_dataset(path, {"train": np.random.default_rng(seed).integers(2, 60, 40)}, seed=seed)
    files = sorted(paths[2].iterdir())
    for file in files:
        if file.suffix == ".bin":
            for number, part in enumerate(np.array_split(np.fromfile(file, "<u2").astype("<u4"), 50)):
                part.tofile(paths[2] / f"{file.stem}-{number:03d}.u4")
        file.unlink()
    adopt(paths[2], load_tokenizer("bytes"), train=["*.u4"], dtype="uint32", report=lambda _: None)
    datasets = [open_dataset(path, packing=packing, seq_len=SEQ_LEN) for path in paths]
    mixture = MixtureDataset([WeightedDataset(path.name, dataset) for path, dataset in zip(paths, datasets)])
    alone = [dataset.micro_batch(np.array([i]), True) for dataset in datasets for i in range(dataset.samples_per_epoch)]
    assert len(alone) == mixture.samples_per_epoch
    chosen = np.random.default_rng(9).permutation(len(alone))
    _, part = mixture.read_plans(chosen, [3, len(chosen) - 3])
    for indices, batch in ((chosen, mixture.micro_batch(chosen, True)), (chosen[3:], mixture.fill(part, True))):
        rows = [alone[i] for i in indices]
        if packing == "varlen":
            rows = [row | {"document_ids": row["document_ids"] + b} for b, row in enumerate(rows)]
        for name, found in batch.items():
            assert np.array_equal(found, np.concatenate([row[name] for row in rows], axis=int(packing == "varlen")))
    with pytest.raises(IndexError, match=f"raw: sample {len(alone)} is none of 0 to {len(alone) - 1}"):
        mixture.micro_batch(np.array([0, len(alone)]))


def test_limits_and_stages(source):
    """A source gives exactly its epochs, its weight then falls to the others; stages set new weights; then it ends."""
    sources = [source("web", 0.5, 3), source("code", 0.3, 2.5), source("math", 0.2, 1)]
    limits = [int(s.max_epochs * s.dataset.samples_per_epoch) for s in sources]
    mixture = MixtureDataset(sources)
    assert mixture.positions_total == sum(limits) and mixture.counts(sum(limits)).tolist() == limits
    assert np.array_equal(drawn(mixture, sum(limits))[-1], limits)
    (first, why), *_, (end, last) = mixture.changes
    assert why.startswith("math is used up after 1 epochs; now web 62.50%, code 37.50%")
    assert end == sum(limits) and "the data end" in last
    after = drawn(mixture, sum(limits))[first : first + 200] - mixture.counts(first)
    assert np.abs(after[:, 0] - 0.625 * np.arange(len(after))).max() <= 1.5 and after[:, 2].max() == 0
    with pytest.raises(ValueError, match=f"the data end at {end}"):
        mixture.order(np.array([end]))

    stages = [Stage(50, {"code": 1}), Stage(90, {"math": 1, "web": 1})]
    staged = MixtureDataset([source("web", 1), source("code", 0, 1), source("math", 0)], stages=stages)
    counts = drawn(staged, 500)
    assert counts[50].tolist() == [50, 0, 0] and counts[90].tolist() == [50, 40, 0]
    assert counts[500].tolist() == [255, 40, 205] and staged.counts(500).tolist() == counts[500].tolist()
    assert [position for position, _ in staged.changes] == [50, 90] and "code 100.00%" in staged.shares(60)
    for start, expected in ((50, [50, 90]), (60, [90])):  # what began before is no change
        later = MixtureDataset(staged.sources, stages=stages, start=start)
        assert [position for position, _ in later.changes] == expected and "code 100.00%" in later.shares(60)


def test_an_order_is_forever(tmp_path):
    """As `test_a_plan_is_forever` of test_packing.py, for `order_version`. Equal shares of a block are due at once."""
    sources = []
    for name, weight, epochs, documents in (("a", 3, None, 40), ("b", 3, 2.5, 30), ("c", 2, None, 20)):
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name, {"train": [7 * i * i % 83 + 1 for i in range(documents)]})
        dataset = TokenDataset(tmp_path / name, seq_len=SEQ_LEN, seed=3)
        dataset.content_sha256 = name  # numpy's random letters decide nothing
        sources.append(WeightedDataset(name, dataset, weight, epochs))
    mixture = MixtureDataset(sources, stages=[Stage(500, {"a": 5, "c": 2, "b": 1})], start=10, consumed={"c": 5})
    assert mixture.changes[0][0] < 500, "a source is used up before the stage"
    order = json.dumps(mixture.order(np.arange(10, 1000)).tolist())
    assert (mixture.order_version, hashlib.sha256(order.encode()).hexdigest()[:16]) == (1, "0537d9b293e94245")


def test_another_mixture_takes_over_where_each_source_was_left(source):
    """Nothing is repeated within an epoch, whatever changes: weights, a source that goes, one that comes, one that
    comes back."""
    read = {name: [] for name in ("web", "code", "math")}

    def follow(mixture, n):
        which, count = mixture.locate(np.arange(mixture.start, mixture.start + n))
        for s, one in enumerate(mixture.sources):
            read[one.name] += one.dataset.order(count[which == s]).tolist()
        return mixture.start + n, mixture.consumed_at(mixture.start + n)

    start, consumed = follow(MixtureDataset([source("web", 0.5), source("code", 0.5)]), 41)
    second = MixtureDataset([source("math", 1), source("web", 1, 1)], start=start, consumed=consumed)
    start, consumed = follow(second, 17)
    last = MixtureDataset([source("code", 1), source("web", 3)], start=start, consumed=consumed)
    follow(last, 30)
    for name, indices in read.items():
        assert len(set(indices)) == len(indices) < source(name).dataset.samples_per_epoch
        assert indices == source(name).dataset.order(np.arange(len(indices))).tolist()
    with pytest.raises(ValueError, match=f"position {start - 1}: this mixture starts at {start}"):
        last.order(np.array([start - 1]))
    # What a checkpoint keeps rebuilds the same function.
    state = last.state()
    again = MixtureDataset([source("code", 1), source("web", 3)], start=state["start"], consumed=state["consumed"])
    positions = np.arange(start, start + 300)
    assert np.array_equal(again.order(positions), last.order(positions)) and again.state() == state
    # A limit that was reached earlier stays reached.
    web = source("web", 1, len(read["web"]) / 2 / source("web").dataset.samples_per_epoch)
    used = MixtureDataset([web, source("code", 1, 1)], start=start, consumed=consumed)
    assert used.locate(np.arange(start, start + 5))[0].tolist() == [1] * 5


def test_differences_are_named(source):
    def state(*sources, **options):
        return MixtureDataset(sources, **options).state()

    one = state(source("web", 1), source("code", 1))
    assert differences(one, state(source("code", 2, as_name="programs"), source("web", 2))) == []
    assert differences(one, state(source("web", 1), source("math", 1, as_name="code"))) == [
        f"code had content {source('code').dataset.content_sha256[:12]}, now "
        f"{source('math').dataset.content_sha256[:12]}"
    ]
    assert differences(one, state(source("web", 3, 2), source("math", 1))) == [
        "weight of web was 0.5, now 0.75",
        "max_epochs of web was None, now 2",
        "code is gone",
        "math is new",
    ]
    (stages,) = differences(one, state(source("web", 1), source("code", 1), stages=[Stage(9, {"web": 1})]))
    assert stages == "stages were none, now {'web': 1} from sample 9"


def test_impossible_mixtures_name_the_source(source):
    cases = {
        "foreign was made with tokenizer builtin .*prepare both with one": [source("web"), source("foreign")],
        "web and again are the same data": [source("web"), source("web", as_name="again")],
        "two sources are named 'web'": [source("web"), source("code", as_name="web")],
        "code=-1": [source("web", 1), source("code", -1)],
        "are all 0": [source("web", 0), source("code", 0)],
        "web: max_epochs 1e-06": [source("web", 1, 1e-6)],
    }
    for message, sources in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            MixtureDataset(sources)
        assert "\n" not in str(error.value)
    for message, stages in {
        "stage 1 name 'prose', which is no source; there are web, code": [Stage(5, {"prose": 1})],
        "stage 2 starts at 5, not after": [Stage(5, {"web": 1}), Stage(5, {"code": 1})],
    }.items():
        with pytest.raises(ValueError, match=message):
            MixtureDataset([source("web"), source("code")], stages=stages)


def test_the_example_of_mixture_plan(monkeypatch):
    """The tables at the top of mixture_plan.py: without and with a stage that begins at position 7."""
    monkeypatch.setattr(mixture_plan, "BLOCK", 5)
    sources = [mixture_plan.PlannedSource(name, name, 1.0, 100, None) for name in "ab"]
    tables = tables_of(mixture_plan.__doc__)
    assert len(tables) == 2
    for table, stages in zip(tables, ([], [Stage(7, {"b": 1})])):
        plan = mixture_plan.MixturePlan(sources, {"a": 3, "b": 2}, stages, start=0, consumed_S=np.zeros(2, np.int64))
        assert integers(table["position"]) == list(range(10))
        source, drawn = plan.locate(np.arange(10))
        assert table["source"] == ["ab"[s] for s in source]
        assert integers(table["drawn before"]) == drawn.tolist()
