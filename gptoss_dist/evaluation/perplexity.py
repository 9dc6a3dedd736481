"""`launch/evaluate.py perplexity`: how well a model predicts text.

What is read, and how it is cut into samples or windows, is in `scored_data.py`.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from data_pipeline import Manifest
from data_pipeline.command_line import print_line
from data_pipeline.corpora.files import is_remote, local_path
from data_pipeline.foreign import convert
from gptoss_dist.checkpoint.info import INFO, CheckpointInfo
from gptoss_dist.distributed.collectives import all_gather_objects, long_timeout_group, raise_on_every_rank
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.evaluation.options import PerplexityOptions
from gptoss_dist.evaluation.pace import Pace
from gptoss_dist.evaluation.results import Result, metric_parts, print_table, publish, results_folder
from gptoss_dist.evaluation.scored_data import Batch, Cut, Source, is_prepared, open_to_score
from gptoss_dist.evaluation.subjects import Evaluated, joined, load
from gptoss_dist.evaluation.tally import Tally, bytes_of_ids, mean_by_weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Source(msgspec.Struct):
    path: str
    weight: float | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """The source's name in the run's losses."""
        return self.name or Path(self.path).name


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
    """What is scored, opened."""

    sources: list[Source]
    cut: Cut
    weights: Mapping[str, float] | None = None
    """Of the sources of the run's mixture by name, in any unit, as the run begins: they make one loss of theirs."""


def evaluate(options: PerplexityOptions) -> None:
    """Do what the command line asks for; in several processes, each scores a share.

    Raises:
        ValueError: There is nothing to score, or it does not fit the model.
    """
    with joined(options.device) as ranks:
        group = long_timeout_group() if ranks.world_size > 1 else None
        evaluated = load(options, ranks)
        plan = raise_on_every_rank(lambda: make_plan(options, evaluated), group)
        evaluated.warn_of_length(plan.cut.seq_len, ranks)
        with results_folder(options, "perplexity", evaluated.subject, ranks) as folder:
            tallies = {
                source.name: measure(evaluated, source, ranks, options.batch_tokens, group) for source in plan.sources
            }
            if ranks.is_main:
                result = summarize(tallies, plan)
                _show(result)
                draw = {"loss_by_context": lambda figure: _draw(figure, result.details["by_context_of"])}
                publish(result, evaluated.subject, folder, figures=draw, mlflow=options.mlflow)
                print(f"results in {folder}")


def make_plan(options: PerplexityOptions, evaluated: Evaluated) -> Plan:
    """Open what is to be scored: what the options say, and for the rest what the run did.

    Raises:
        ValueError: Neither says what to read, it cannot be read, or settings contradict each other.
    """
    trained = None
    if evaluated.is_checkpoint:
        settings = CheckpointInfo.read(evaluated.folder).config
        trained = convert(settings, _Trained, evaluated.folder / INFO, remedy="name what to read with --data")
    data = _data(options, trained)
    cut = _cut(options, trained, evaluated.model.config.max_position_embeddings)
    if options.packing is not None and not any(is_prepared(path) for path in data.values()):
        raise ValueError(
            f"packing={options.packing} has no meaning for text, which is read document by document; leave it out, or "
            "prepare the text"
        )
    sources = [open_to_score(name, path, cut, evaluated.tokenizer) for name, path in data.items()]
    weights = None
    if trained is not None and not options.data and len(data) > 1:
        weights = {s.label: _weight(s) for s in trained.data.sources if s.label in data}
    return Plan(sources, cut, weights)


def _data(options: PerplexityOptions, trained: _Trained | None) -> dict[str, str]:
    """Return the path of everything that is to be scored, by the name that the results give it.

    Raises:
        ValueError: There is nothing, or something is named twice.
    """
    if options.data:
        paths = [path if is_remote(path) else str(local_path(path)) for path in options.data]
        places = [path if is_remote(path) else os.path.realpath(path) for path in paths]
        for path, place in zip(options.data, places):
            if places.count(place) > 1:
                raise ValueError(f"data={path} is named twice; name it once")
        return {_name(path, paths): path for path in paths}
    if trained is None:
        raise ValueError(f"{options.checkpoint} is no run, whose data are known; name what to read with --data")
    sources = trained.data.sources or [_Source(trained.data.path or "data/pystdlib")]
    data = {s.label: s.path for s in sources if Manifest.read(s.path).splits.get(options.split)}  # as in training
    if not data:
        raise ValueError(f"{options.checkpoint}: its data have no split {options.split}; give another, or --data")
    return data


def _cut(options: PerplexityOptions, trained: _Trained | None, positions: int) -> Cut:
    """Return how data are cut.

    Args:
        options: What was asked for.
        trained: The settings of the run, if there is one.
        positions: How many the model was made for.

    Raises:
        ValueError: Settings contradict each other.
    """
    seq_len = options.seq_len or (trained.data.seq_len if trained else positions)
    if options.stride is not None and options.stride > seq_len:
        raise ValueError(
            f"stride={options.stride} would leave out tokens between windows of seq_len={seq_len}; "
            f"give at most that, or a larger --seq-len"
        )
    if options.stride is not None and options.packing is not None:
        raise ValueError(f"packing={options.packing} has no meaning with --stride, which takes each document by itself")
    samples = options.samples
    if samples is None and not options.data and trained and options.stride is None:
        samples = trained.validation.samples
    return Cut(
        seq_len=seq_len,
        stride=options.stride,
        packing=options.packing or (trained.data.packing if trained else "contiguous"),
        document_mask=trained.data.document_mask if trained else False,
        samples=samples or None,
        seed=trained.run.seed if trained else 0,
        split=options.split,
        text_column=options.text_column,
    )


def _weight(source: _Source) -> float:
    """Return the weight of a source in the run's mixture: what the run was given, or else its number of tokens."""
    return float(Manifest.read(source.path).tokens("train")) if source.weight is None else source.weight


def _name(path: str, all_paths: Sequence[str]) -> str:
    name = Path(path).name or path
    return path if [Path(other).name for other in all_paths].count(name) > 1 else name


def measure(
    evaluated: Evaluated,
    source: Source,
    ranks: Ranks,
    batch_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> Tally:
    """Score one dataset or text; collective where there are ranks.

    Args:
        evaluated: The model.
        source: What is scored.
        ranks: This process.
        batch_tokens: Tokens of a forward pass.
        group: A group of all ranks, to wait in for the slowest of them, if not the default one.

    Returns:
        The sums over all ranks.
    """
    bytes_V, tally, pace = bytes_of_ids(evaluated.tokenizer), Tally(), Pace(ranks.is_main)
    for batch in source.batches(evaluated.tokenizer, ranks, batch_tokens):
        loss_BT = score(evaluated.model, batch, evaluated.device)
        tally.add(batch["labels"], loss_BT, context_lengths(batch), bytes_V)
        if pace.is_due():
            who = f" by the first of {ranks.world_size} processes" if ranks.world_size > 1 else ""
            print_line(f"{source.name}: {tally.tokens:,} tokens scored{who}, loss {tally.mean:.4f} so far", sys.stderr)
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


# What is told ---------------------------------------------------------------------------------------------------------


def summarize(tallies: Mapping[str, Tally], plan: Plan) -> Result:
    """Return the numbers of all sources, and those of all of them together.

    Args:
        tallies: The sums by source.
        plan: What was scored.
    """
    whole = sum(tallies.values(), Tally())
    if not whole.tokens:
        raise ValueError("there is no token to predict in what was read")
    rows = [tally.row(name) for name, tally in tallies.items()]
    if len(rows) > 1:
        rows.append(whole.row("all tokens"))
    if plan.weights is not None:
        rows.append(_by_weight(tallies, plan.weights))
    metrics = {f"eval/perplexity/{key}": rows[-1][key] for key in ("loss", "perplexity", "bits_per_byte")}
    if len(tallies) > 1:
        parts = metric_parts(tallies)
        for row in rows[: len(tallies)]:
            metrics |= {f"eval/perplexity/{parts[row['data']]}/{key}": row[key] for key in ("loss", "bits_per_byte")}
    cut = plan.cut
    cuts = {source.name: source.cut_in_words for source in plan.sources}
    settings = {
        "data": [source.path for source in plan.sources],
        "cut": _in_words(cuts),
        **{name: getattr(cut, name) for name in ("split", "seq_len", "stride", "samples")},
        "packing": cut.packing if any(source.is_packed for source in plan.sources) else None,
    }
    details = {
        "by_context": whole.by_context(cut.seq_len),
        "by_context_of": {name: tally.by_context(cut.seq_len) for name, tally in tallies.items()},
        "dropped": {source.name: source.dropped for source in plan.sources if any(source.dropped.values())},
    }
    return Result("perplexity", settings, rows, metrics, details)


def _in_words(values: Mapping[str, str]) -> str:
    """Return the value of all names, or each name with its own where they differ."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return "; ".join(f"{name}: {value}" for name, value in values.items())


def _by_weight(tallies: Mapping[str, Tally], weights: Mapping[str, float]) -> dict[str, Any]:
    loss = mean_by_weight({name: tally.mean for name, tally in tallies.items()}, weights)
    return {
        "data": "mean by weight",
        "tokens": sum(tally.tokens for tally in tallies.values()),
        "bytes": sum(tally.bytes for tally in tallies.values()),
        "loss": loss,
        "perplexity": float(np.exp(min(loss, 700.0))),
        "bits_per_byte": mean_by_weight({name: tally.bits_per_byte for name, tally in tallies.items()}, weights),
    }


def _show(result: Result) -> None:
    print_table(result.rows)
    for name, dropped in result.details["dropped"].items():
        print(f"{name}: {dropped['empty']:,} empty and {dropped['duplicate']:,} repeated documents are left out")
    print("\nloss by context:")
    print_table(result.details["by_context"])


def _draw(figure: Figure, lines_of: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    axes = figure.subplots()
    for name, lines in lines_of.items():
        axes.plot([line["context"] for line in lines], [line["loss"] for line in lines], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of context, or more")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
