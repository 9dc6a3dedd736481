"""`launch/evaluate.py perplexity`: how well a model predicts text.

Two ways to cut text into what the model sees:

    samples    as in training: samples of the packing, each token counted. The validation loss, of the same samples.
    windows    each document by itself, behind an end-of-text token, in windows of T tokens that begin `stride` apart:

               stride 3, T = 5     E a b c d                  counted: a b c d e
                                         c d e f g            counted:           f g h

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from data_pipeline import (
    Manifest,
    MixtureDataset,
    Tokenizer,
    WeightedDataset,
    open_dataset,
    open_source,
    validation_batches,
)
from data_pipeline.batches.reading import IGNORED_LABEL
from data_pipeline.foreign import convert
from gptoss_dist.checkpoint.info import INFO, CheckpointInfo
from gptoss_dist.distributed.collectives import all_gather_objects, broadcast_object, long_timeout_group
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.evaluation.options import PerplexityOptions
from gptoss_dist.evaluation.results import Result, metric_parts, print_table, publish, results_folder
from gptoss_dist.evaluation.subjects import Evaluated, joined, load
from gptoss_dist.evaluation.tally import Tally, bytes_of_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from data_pipeline.batches.token_split import TokenSplit

Batch = Mapping[str, np.ndarray]
"""`input_ids` and `labels` [B, T], and perhaps `document_ids` [B, T]."""
WINDOWS_SORTED_TOGETHER = 512
WHOLE_DOCUMENTS = 2**31 - 1


class _Source(msgspec.Struct):
    path: str
    weight: float | None = None
    max_epochs: float | None = None
    name: str | None = None


class _Data(msgspec.Struct):
    seq_len: int
    path: str | None = None
    sources: list[_Source] = []
    packing: str = "contiguous"
    document_mask: bool = False


class _Validation(msgspec.Struct):
    samples: int = 256


class _Seed(msgspec.Struct):
    seed: int = 0


class _Trained(msgspec.Struct):
    """What a run's settings say of its validation."""

    data: _Data
    validation: _Validation
    run: _Seed


@dataclass(frozen=True)
class Plan:
    """What is read, and how it is cut."""

    data: list[_Source]
    seq_len: int
    stride: int | None
    packing: str
    document_mask: bool
    samples: int | None
    seed: int
    split: str
    text_column: str
    weighted: bool
    """Whether `data` are the sources of the run's mixture, whose weights make one loss of theirs."""


def evaluate(options: PerplexityOptions) -> None:
    """Do what the command line asks for; in several processes, each scores a share.

    Raises:
        ValueError: There is nothing to score, or it does not fit the model.
    """
    with joined(options.device) as ranks:
        evaluated = load(options, ranks)
        plan = make_plan(options, evaluated)
        evaluated.warn_of_length(plan.seq_len, ranks)
        folder = broadcast_object(lambda: results_folder(options, "perplexity", evaluated.subject))
        weights = weights_of(plan) if plan.weighted else None
        group = long_timeout_group() if ranks.world_size > 1 else None
        tallies = {
            source.name or source.path: measure(evaluated, plan, source, ranks, options.batch_tokens, group)
            for source in plan.data
        }
        if ranks.is_main:
            result = summarize(tallies, plan, weights)
            _show(result)
            draw = {"loss_by_context": lambda figure: _draw(figure, tallies)}
            publish(result, evaluated.subject, folder, figures=draw, mlflow=options.mlflow)
            print(f"results in {folder}")


def make_plan(options: PerplexityOptions, evaluated: Evaluated) -> Plan:
    """Return what is to be read: what the options say, and for the rest what the run did.

    Raises:
        ValueError: Neither says what to read, or settings contradict each other.
    """
    trained = None
    if evaluated.is_checkpoint:
        settings = CheckpointInfo.read(evaluated.folder).config
        trained = convert(settings, _Trained, evaluated.folder / INFO, remedy="name what to read with --data")
    if options.data:
        data = [_Source(path, name=_name(path, options.data)) for path in options.data]
    elif trained is None:
        raise ValueError(f"{options.checkpoint} is no run, whose data are known; name what to read with --data")
    else:
        data = trained.data.sources or [_Source(trained.data.path or "data/pystdlib")]
        data = [_Source(s.path, s.weight, s.max_epochs, s.name or Path(s.path).name) for s in data]
        data = [source for source in data if Manifest.read(source.path).splits.get(options.split)]  # as in training
        if not data:
            raise ValueError(f"{options.checkpoint}: its data have no split {options.split}; give another, or --data")
    positions = evaluated.model.config.max_position_embeddings
    seq_len = options.seq_len or (trained.data.seq_len if trained else positions)
    if options.stride is not None and options.stride > seq_len:
        raise ValueError(f"stride={options.stride} would leave out tokens between windows of seq_len={seq_len}")
    if options.stride is not None and options.packing is not None:
        raise ValueError(f"packing={options.packing} has no meaning with --stride, which takes each document by itself")
    samples = options.samples
    if samples is None and not options.data and trained and options.stride is None:
        samples = trained.validation.samples
    return Plan(
        data=data,
        seq_len=seq_len,
        stride=options.stride,
        packing=options.packing or (trained.data.packing if trained else "contiguous"),
        document_mask=trained.data.document_mask if trained else False,
        samples=samples or None,
        seed=trained.run.seed if trained else 0,
        split=options.split,
        text_column=options.text_column,
        weighted=not options.data and len(data) > 1,
    )


def _name(path: str, all_paths: Sequence[str]) -> str:
    name = Path(path).name or path
    return path if [Path(other).name for other in all_paths].count(name) > 1 else name


def measure(
    evaluated: Evaluated,
    plan: Plan,
    source: _Source,
    ranks: Ranks,
    batch_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> Tally:
    """Score one dataset or text; collective where there are ranks.

    Args:
        evaluated: The model.
        plan: How it is read.
        source: What is read.
        ranks: This process.
        batch_tokens: Tokens of a forward pass.
        group: A group of all ranks, to wait in for the slowest of them, if not the default one.

    Returns:
        The sums over all ranks.
    """
    bytes_V, tally = bytes_of_ids(evaluated.tokenizer), Tally()
    for batch in _batches(evaluated.tokenizer, plan, source, ranks, batch_tokens):
        loss_BT = score(evaluated.model, batch, evaluated.device)
        tally.add(batch["labels"], loss_BT, context_lengths(batch), bytes_V)
    return sum(all_gather_objects(tally, group), Tally())


@torch.no_grad()
def score(model: torch.nn.Module, batch: Batch, device: torch.device) -> np.ndarray:
    """Return the loss of each label of a batch in nats, float32 [B, T]; 0 where there is none."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
    scores = model(tensors["input_ids"], tensors["labels"], document_ids_BT=tensors.get("document_ids"), per_token=True)
    return scores.loss_BT.cpu().numpy()


def context_lengths(batch: Batch) -> np.ndarray:
    """Return how many tokens of its text each position sees, itself among them, int64 [B, T]."""
    place_BT = np.broadcast_to(np.arange(batch["input_ids"].shape[1]), batch["input_ids"].shape)
    if "document_ids" not in batch:
        return place_BT + 1
    is_first = np.diff(batch["document_ids"], axis=1, prepend=-1) > 0
    return place_BT - np.maximum.accumulate(np.where(is_first, place_BT, 0), axis=1) + 1


# What is scored -------------------------------------------------------------------------------------------------------


def _batches(tokenizer: Tokenizer, plan: Plan, source: _Source, ranks: Ranks, batch_tokens: int) -> Iterator[Batch]:
    """Yield this rank's share of what is read of one source."""
    is_prepared = (Path(source.path) / "manifest.json").is_file()
    if is_prepared and plan.stride is None:
        yield from _samples(_open(source, plan, tokenizer), plan, ranks, batch_tokens)
        return
    if is_prepared:
        documents = _documents(_open(source, plan, tokenizer, whole=True), plan.samples)
    else:
        documents = _documents_of_text(source.path, plan, tokenizer)
    windows = _windows(documents, plan.seq_len, plan.stride or plan.seq_len, tokenizer.eot_id)
    mine = itertools.islice(windows, ranks.rank, None, ranks.world_size)
    yield from _batched(mine, batch_tokens, tokenizer.eot_id)


def _open(source: _Source, plan: Plan, tokenizer: Tokenizer, whole: bool = False) -> TokenSplit:
    packing, seq_len = ("varlen", WHOLE_DOCUMENTS) if whole else (plan.packing, plan.seq_len)
    split = open_dataset(source.path, packing=packing, seq_len=seq_len, split=plan.split, seed=plan.seed)
    if split.tokenizer.sha256 != tokenizer.sha256:
        raise ValueError(
            f"{source.path} was made with tokenizer {split.tokenizer.name}, and the model's is {tokenizer.name}; "
            "prepare the text with the model's, or name the text itself"
        )
    return split


def _samples(split: TokenSplit, plan: Plan, ranks: Ranks, batch_tokens: int) -> Iterator[Batch]:
    batches = validation_batches(
        split,
        micro_batch_size=max(1, batch_tokens // plan.seq_len),
        rank=ranks.rank,
        world_size=ranks.world_size,
        max_samples=plan.samples,
        document_mask=plan.document_mask,
    )
    for batch in batches:
        yield {name: tensor.numpy() for name, tensor in batch.items()}


def _documents(split: TokenSplit, most: int | None) -> Iterator[np.ndarray]:
    """Yield documents, evenly over a split, each with its end-of-text token."""
    for index in _evenly(split.samples_per_epoch, most):
        arrays = split.micro_batch(np.array([index]))
        yield np.concatenate([arrays["input_ids"][0], arrays["labels"][0, -1:]])


def _documents_of_text(spec: str, plan: Plan, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the documents of a text, evenly over it, each with an end-of-text token."""
    texts = list(open_source(spec, text_column=plan.text_column).documents())
    if not texts:
        raise ValueError(f"{spec}: holds no document")
    for index in _evenly(len(texts), plan.samples):
        yield np.append(tokenizer.encode(texts[index]).astype(np.int64), tokenizer.eot_id)


def _evenly(count: int, most: int | None) -> Iterator[int]:
    chosen = min(count, most or count)
    return (index * count // chosen for index in range(chosen))


def _windows(
    documents: Iterator[np.ndarray], seq_len: int, stride: int, eot_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield inputs and labels of each window, int64 of the same length; labels that an earlier one had are -100."""
    for tokens in documents:
        inputs, counted = np.concatenate([[eot_id], tokens[:-1]]), 0
        while counted < len(tokens):
            end = min(counted + (stride if counted else seq_len), len(tokens))
            begin = max(0, end - seq_len)
            labels = tokens[begin:end].copy()
            labels[: counted - begin] = IGNORED_LABEL
            yield inputs[begin:end], labels
            counted = end


def _batched(windows: Iterator[tuple[np.ndarray, np.ndarray]], batch_tokens: int, padding_id: int) -> Iterator[Batch]:
    """Yield windows of like lengths together, padded behind, where no token sees the padding."""
    for group in iter(lambda: list(itertools.islice(windows, WINDOWS_SORTED_TOGETHER)), []):
        group.sort(key=lambda window: len(window[0]), reverse=True)
        while group:
            rows = max(1, batch_tokens // len(group[0][0]))
            taken, group = group[:rows], group[rows:]
            shape = (len(taken), len(taken[0][0]))
            ids, labels = np.full(shape, padding_id, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
            for row, (inputs, targets) in enumerate(taken):
                ids[row, : len(inputs)], labels[row, : len(targets)] = inputs, targets
            yield {"input_ids": ids, "labels": labels}


# What is told ---------------------------------------------------------------------------------------------------------


def weights_of(plan: Plan) -> dict[str, float]:
    """Return the weights that the run's mixture begins with, by the source's name: those of its validation loss."""
    sources = [
        WeightedDataset(
            source.name or source.path,
            open_dataset(source.path, packing=plan.packing, seq_len=plan.seq_len, split="train", seed=plan.seed),
            source.weight,
            source.max_epochs,
        )
        for source in plan.data
    ]
    return MixtureDataset(sources).weights


def summarize(tallies: Mapping[str, Tally], plan: Plan, weights: Mapping[str, float] | None) -> Result:
    """Return the numbers of all sources, and those of all of them together.

    Args:
        tallies: The sums by source.
        plan: What was read.
        weights: Weights of the sources, for a mean by weight beside that over all tokens.
    """
    whole = sum(tallies.values(), Tally())
    if not whole.tokens:
        raise ValueError("there is no token to predict in what was read")
    rows = [tally.row(name) for name, tally in tallies.items()]
    if len(rows) > 1:
        rows.append(whole.row("all tokens"))
    if weights is not None:
        rows.append(_by_weight(tallies, weights))
    metrics = {f"eval/perplexity/{key}": rows[-1][key] for key in ("loss", "perplexity", "bits_per_byte")}
    if len(tallies) > 1:
        parts = metric_parts(tallies)
        for row in rows[: len(tallies)]:
            metrics |= {f"eval/perplexity/{parts[row['data']]}/{key}": row[key] for key in ("loss", "bits_per_byte")}
    settings = {
        "data": [source.path for source in plan.data],
        "cut": f"windows of {plan.seq_len}, stride {plan.stride}" if plan.stride else f"{plan.packing}, {plan.seq_len}",
        **{name: getattr(plan, name) for name in ("split", "seq_len", "stride", "packing", "samples")},
    }
    details = {
        "by_context": whole.by_context(),
        "by_context_of": {name: tally.by_context() for name, tally in tallies.items()},
    }
    return Result("perplexity", settings, rows, metrics, details)


def _by_weight(tallies: Mapping[str, Tally], weights: Mapping[str, float]) -> dict[str, Any]:
    total = sum(weights[name] for name in tallies)
    shares = {name: weights[name] / total if total else 1 / len(tallies) for name in tallies}
    loss = sum(share * tallies[name].mean for name, share in shares.items())
    return {
        "data": "mean by weight",
        "tokens": sum(tally.tokens for tally in tallies.values()),
        "bytes": sum(tally.bytes for tally in tallies.values()),
        "loss": loss,
        "perplexity": float(np.exp(min(loss, 700.0))),
        "bits_per_byte": sum(share * tallies[name].bits_per_byte for name, share in shares.items()),
    }


def _show(result: Result) -> None:
    print_table(result.rows)
    print("\nloss by context:")
    print_table(result.details["by_context"])


def _draw(figure: Figure, tallies: Mapping[str, Tally]) -> None:
    axes = figure.subplots()
    for name, tally in tallies.items():
        lines = tally.by_context()
        axes.plot([line["context"] for line in lines], [line["loss"] for line in lines], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of context, or more")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
