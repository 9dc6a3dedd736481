"""Perplexity and bits per byte: windows by definition, and the validation loss of a run."""

import json
import math
import posixpath
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.evaluation.options import PerplexityOptions
from gptoss_dist.evaluation.perplexity import Plan, context_lengths, make_plan, measure, summarize
from gptoss_dist.evaluation.results import Subject
from gptoss_dist.evaluation.scored_data import Cut
from gptoss_dist.evaluation.subjects import Evaluated
from gptoss_dist.evaluation.tally import Tally, bytes_of_ids
from gptoss_dist.model.init import initialize
from gptoss_dist.tracking.delivery.requests import clean_key
from tests.support.ranks import MODEL, losses, run
from tests.support.token_data import write_dataset

TEXTS = ["a", "naïve 猫 " * 5, "x" * 40, "import os\n" * 9, "b" * 15]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    tokenizer = load_tokenizer("bytes")
    model = GptOss(ModelConfig(**MODEL | {"initializer_range": 0.3}))
    initialize(model, seed=0)
    folder = tmp_path_factory.mktemp("model")
    return Evaluated(model.eval(), tokenizer, Subject("tiny", "tiny"), folder, is_checkpoint=False)


def tally(evaluated, *data: str, batch_tokens: int = 64, ranks: Ranks | None = None, **options) -> Tally:
    options = PerplexityOptions(checkpoint="tiny", data=list(data), **options)
    plan = make_plan(options, evaluated)
    ranks = ranks or Ranks(0, 0, 1, torch.device("cpu"))
    return sum((measure(evaluated, source, ranks, batch_tokens) for source in plan.sources), Tally())


def write_texts(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(texts: Path, folder: Path, *options: str) -> Path:
    from data_pipeline.prepare.__main__ import main

    assert main([str(texts), "--output", str(folder), "--validation-fraction", "0", *options]) == 0
    return folder


@torch.no_grad()
def by_definition(evaluated, texts, seq_len: int, stride: int) -> tuple[float, float, int, int]:
    """Loss, loss of text, tokens and bytes, one token after the other from the logits of the window that counts it."""
    model, tokenizer = evaluated.model, evaluated.tokenizer
    total = text_total = 0.0
    tokens = 0
    for text in texts:
        ids = [tokenizer.eot_id, *tokenizer.encode(text).tolist(), tokenizer.eot_id]
        for place in range(1, len(ids)):
            # The first window has seq_len inputs, each later one begins `stride` after the one before it.
            number = max(0, math.ceil((place - seq_len) / stride))
            end = min(seq_len + number * stride, len(ids) - 1)
            begin = max(0, end - seq_len)
            logits = model(torch.tensor([ids[begin:place]]))[0, -1]
            loss = -float(logits.log_softmax(-1)[ids[place]])
            total, tokens = total + loss, tokens + 1
            text_total += loss if ids[place] != tokenizer.eot_id else 0.0
    return total, text_total, tokens, sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("seq_len, stride", [(16, 16), (16, 5), (16, 1), (64, 8), (7, 7)])
def test_windows_count_each_token_once_with_the_context_that_they_promise(evaluated, tmp_path, seq_len, stride):
    path = write_texts(tmp_path / "texts.jsonl", TEXTS)
    found = tally(evaluated, str(path), seq_len=seq_len, stride=stride)
    loss, text_loss, tokens, size = by_definition(evaluated, TEXTS, seq_len, stride)
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(text_loss / math.log(2) / size, rel=1e-5)
    assert found.bucket_tokens.sum() == tokens and found.bucket_loss.sum() == pytest.approx(found.loss)


def test_prepared_text_gives_what_the_text_gives(evaluated, tmp_path, monkeypatch, capsys):
    """Also of records that `prepare` leaves out, and of samples of the documents."""
    copies = [TEXTS[1], None, "", *TEXTS, "", TEXTS[3], "\ud83d", "\ufffd"]  # a lone surrogate becomes U+FFFD
    path = write_texts(tmp_path / "texts.jsonl", copies)
    data = prepare(path, tmp_path / "data", "--tokenizer", "bytes")
    for samples in (0, 4, 1):
        found = tally(evaluated, str(data), seq_len=16, stride=5, split="train", samples=samples)
        of_text = tally(evaluated, str(path), seq_len=16, stride=5, samples=samples)
        assert (found.tokens, found.bytes) == (of_text.tokens, of_text.bytes)
        assert found.loss == pytest.approx(of_text.loss, rel=1e-6)
    monkeypatch.setattr("gptoss_dist.evaluation.pace.EVERY_S", 0.0)
    of_text = tally(evaluated, str(path), seq_len=16)
    assert capsys.readouterr().err.endswith(
        f"texts.jsonl: {of_text.tokens:,} tokens scored, loss {of_text.mean:.4f} so far\n"
    )
    plan = make_plan(PerplexityOptions(checkpoint="tiny", data=[str(path)], seq_len=16), evaluated)
    result = summarize({"texts.jsonl": of_text}, plan)
    assert result.details["dropped"] == {"texts.jsonl": {"empty": 3, "duplicate": 3}}
    with pytest.raises(ValueError, match="holds no document"):
        tally(evaluated, str(write_texts(tmp_path / "empty.jsonl", ["", None])))


def test_results_say_how_each_source_was_cut(evaluated, tmp_path):
    path = write_texts(tmp_path / "texts.jsonl", TEXTS)
    data = prepare(path, tmp_path / "data", "--tokenizer", "bytes")

    def settings(*data, **options):
        options = PerplexityOptions(checkpoint="tiny", data=[*map(str, data)], seq_len=16, split="train", **options)
        found = summarize({"x": Tally(tokens=1)}, make_plan(options, evaluated)).settings
        return found["cut"], found["packing"]

    assert settings(path) == ("windows of 16, stride 16", None)
    assert settings(path, data, stride=4) == ("windows of 16, stride 4", None)
    assert settings(data, packing="best_fit") == ("best_fit, 16", "best_fit")
    both = "texts.jsonl: windows of 16, stride 16; data: best_fit, 16"
    assert settings(path, data, packing="best_fit") == (both, "best_fit")


def test_all_data_are_opened_before_any_are_scored(evaluated, tmp_path):
    good = write_texts(tmp_path / "good.jsonl", TEXTS)
    malformed = write_texts(tmp_path / "malformed.jsonl", [*TEXTS, 5])
    other = prepare(good, tmp_path / "other", "--tokenizer", "builtin")
    (tmp_path / "link.jsonl").symlink_to(good)
    for second, message in (
        (tmp_path / "typo.jsonl", r"typo\.jsonl.*no such file"),
        (malformed, r"malformed\.jsonl.*holds int, not text"),
        (other, "made with tokenizer builtin, and the model's is bytes"),
        (good, r"data=.*good\.jsonl is named twice"),
        (f"{tmp_path}/./good.jsonl", r"good\.jsonl is named twice"),
        (tmp_path / "link.jsonl", r"good\.jsonl is named twice"),
    ):
        options = PerplexityOptions(checkpoint="tiny", data=[str(good), str(second)], split="train", seq_len=16)
        with pytest.raises(ValueError, match=message):
            make_plan(options, evaluated)


def test_context_lengths_and_buckets():
    ids = np.array([[0, 0, 0, 1, 1, 2]])
    assert context_lengths({"input_ids": ids}).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert context_lengths({"input_ids": ids, "document_ids": ids}).tolist() == [[1, 2, 3, 1, 2, 1]]
    found, labels = Tally(), np.array([[5, 6, -100, 7, 8]])
    context = np.array([[1, 63, 64, 64, 200]])
    loss = np.array([[1, 2, 50, 3, 4]], np.float32)
    found.add(labels, loss, context, np.array([0] * 6 + [2, 3, 0]))
    assert (found.tokens, found.loss, found.bytes, found.text_loss) == (4, 10.0, 5, 5.0)
    assert found.by_context(200) == [
        {"context": 1, "to": 63, "tokens": 2, "loss": 1.5},
        {"context": 64, "to": 127, "tokens": 1, "loss": 3.0},
        {"context": 128, "to": 200, "tokens": 1, "loss": 4.0},
    ]


def test_special_tokens_stand_for_no_text():
    tokenizer = load_tokenizer("builtin")
    sizes = bytes_of_ids(tokenizer)
    ids = tokenizer.encode("naïve 猫\n  import")
    assert sizes[ids].sum() == len("naïve 猫\n  import".encode())
    assert not sizes[list(tokenizer.special_tokens.values())].any() and len(sizes) == tokenizer.n_vocab


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": []}, "tiny is no run, whose data are known"),
        ({"data": ["x"], "seq_len": 8, "stride": 9}, "stride=9 would leave out tokens"),
        ({"data": ["x"], "stride": 4, "packing": "varlen"}, "packing=varlen has no meaning with --stride"),
        ({"data": ["x"], "packing": "best_fit"}, "packing=best_fit has no meaning for text"),
    ],
)
def test_mistakes_are_refused(evaluated, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(PerplexityOptions(checkpoint="tiny", **options), evaluated)


def test_metrics_of_data_with_odd_names_are_those_that_mlflow_takes():
    names = [
        "data/one",
        "../data/one",
        "/data/one",
        "texts/*.txt",
        "texts/?.txt",
        "..",
        "a//b/",
        "büch-ér: 2",
        "x" * 300,
    ]
    tallies = {name: Tally(tokens=1, loss=float(number), bytes=1) for number, name in enumerate(names)}
    metrics = summarize(tallies, Plan([], Cut(8))).metrics
    assert len(metrics) == 3 + 2 * len(names)
    assert metrics["eval/perplexity/data/one/loss"] == 0 and metrics["eval/perplexity/texts/_.txt/loss"] == 3
    for metric in metrics:
        assert clean_key(metric) == metric == posixpath.normpath(metric)


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """A run of two sources that ends with a validation, and a third one that cannot be validated on."""
    root = tmp_path_factory.mktemp("mixed")
    for seed, name in enumerate(("one", "two", "three")):
        lengths = {"train": [50] * 40} | ({"validation": [37, 90, 12, 60 + seed, 41] * 4} if seed < 2 else {})
        (root / name).mkdir()
        write_dataset(root / name, lengths, seed=seed)
    values = {
        "model": MODEL,
        "train": {"steps": 3, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-2},
        "validation": {"every": 3, "samples": 7},
        "checkpoint": {"every": 3},
        "tracking": {"mlflow": False, "plots": False, "report": False},
    }
    return root, values


@pytest.mark.distributed
@pytest.mark.parametrize(
    "packing, processes, weights",
    [
        ("contiguous", 2, [3, 1]),
        ("best_fit", 1, [None, None]),
        ("varlen", 1, [0, 0, 1]),  # a curriculum that begins with what cannot be validated on
    ],
)
def test_it_is_the_validation_loss_of_the_run(mixed_run, tmp_path, packing, processes, weights):
    root, values = mixed_run
    folder = tmp_path / "run"
    sources = [{"path": str(root / name), "weight": weight} for name, weight in zip(("one", "two", "three"), weights)]
    data = {"sources": sources, "packing": packing, "seq_len": 48}
    if not weights[0] and weights[-1]:
        data["stages"] = [{"from_step": 1, "weights": {"one": 3, "two": 1}}]
    values = values | {"run": {"name": "tiny", "dir": str(folder)}, "data": data}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run("launch/train.py", "--config", str(tmp_path / "run.yaml"))
    options = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--batch-tokens", "150", "--no-mlflow"]
    done = run("launch/evaluate.py", "perplexity", *options, processes=processes)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {row["data"]: row for row in result["rows"]}
    for row, name in (("mean by weight", "loss/val"), ("one", "loss/val_one"), ("two", "loss/val_two")):
        assert rows[row]["loss"] == pytest.approx(losses(folder, name)[3], rel=2e-6)
    assert done.stdout.count("bits_per_byte") == 1 and (tmp_path / "out" / "loss_by_context.png").is_file()
    assert result["metrics"]["eval/perplexity/loss"] == rows["mean by weight"]["loss"]
    assert rows["all tokens"]["tokens"] == rows["one"]["tokens"] + rows["two"]["tokens"]
    again = ["--checkpoint", str(folder), "--data", str(root / "one"), "--output", str(tmp_path / "out")]
    done = run("launch/evaluate.py", "perplexity", *again, processes=processes, expect=2)
    assert "exists already" in done.stderr and done.stderr.count("\n") == 1


def test_ranks_share_the_windows(evaluated, tmp_path):
    path = write_texts(tmp_path / "texts.jsonl", TEXTS)
    whole = tally(evaluated, str(path), seq_len=16, stride=5)
    parts = [
        tally(evaluated, str(path), seq_len=16, stride=5, ranks=Ranks(rank, 0, 3, torch.device("cpu")))
        for rank in range(3)
    ]
    assert all(part.tokens for part in parts) and sum(parts, Tally()).tokens == whole.tokens
    assert sum(parts, Tally()).loss == pytest.approx(whole.loss, rel=1e-6)
    assert len({part.loss for part in parts}) == 3
