"""What differs between runs: settings, code and hardware, and whether their losses can be compared at all."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_dist.tracking.comparing.runs import ComparedRun

ABSENT = "–"
_UNSEEN = ("run.name", "run.dir", "tracking.", "resume")
"""Settings, or sections, that say nothing about the model."""
_WITHOUT_EFFECT = (
    *_UNSEEN,
    "run.seed",
    "checkpoint.",
    "sampling.",
    "validation.",
    "distributed.",
    "evaluation.",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "train.log_every_s",
    "train.profile_step",
    "train.find_non_finite",
)
"""Settings in which replicas may differ: the seed, and what does not change what is learnt."""
_TAGS = ("git.sha", "hardware", "torch", "world_size", "layout", "routing", "tokens_per_step", "flops_per_token")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all runs. Shape: R runs."""

    key: str
    values: list[str]
    """[R]; a dash where a run does not say."""
    is_setting: bool
    """Whether it is a setting, and no property that was noted."""


@dataclass(frozen=True)
class Doubt:
    """A reason why losses of these runs are not comparable, or only with care."""

    text: str
    spoils_losses: bool = False
    """Nothing is judged."""


def differences(runs: list[ComparedRun]) -> list[Difference]:
    """Return what differs, settings first; names and folders of runs, and where they are tracked, are left out."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config if not key.startswith(_UNSEEN)))
    found = [Difference(key, [run.config.get(key, ABSENT) for run in runs], True) for key in keys]
    found.append(Difference("data digest", [run.dataset.get("digest", ABSENT)[:12] for run in runs], False))
    found += [Difference(tag, [run.tags.get(tag, ABSENT) for run in runs], False) for tag in _TAGS]
    return [difference for difference in found if len(set(difference.values)) > 1]


def replicas(runs: list[ComparedRun]) -> list[list[int]]:
    """Return the runs in groups whose settings and data are the same but for the seed, as indices, in order."""
    groups: dict[tuple, list[int]] = {}
    for index, run in enumerate(runs):
        settings = {key: value for key, value in run.config.items() if not key.startswith(_WITHOUT_EFFECT)}
        key = (*sorted(settings.items()), run.dataset.get("digest", ""), run.tags.get("routing", ""))
        # Without a configuration nothing says that two runs are alike.
        groups.setdefault(key if settings else (index,), []).append(index)
    return list(groups.values())


def labels(runs: list[ComparedRun], groups: list[list[int]]) -> list[str]:
    """Return a name for each group: its run's, or its first one's, with what sets it apart if that is short."""
    keys = [d.key for d in differences(runs) if d.is_setting and not d.key.startswith(_WITHOUT_EFFECT)]
    apart = [
        ", ".join(f"{key.rpartition('.')[2]} {runs[group[0]].config.get(key, ABSENT)}" for key in keys)
        for group in groups
    ]
    if not 1 <= len(keys) <= 2 or len(set(apart)) < len(groups) or any(len(one) > 60 for one in apart):
        return [runs[group[0]].name + (f" and {len(group) - 1} more" if len(group) > 1 else "") for group in groups]
    return [
        f"{one} ({len(group)} runs)" if len(group) > 1 else f"{runs[group[0]].name} ({one})"
        for one, group in zip(apart, groups)
    ]


def doubts(runs: list[ComparedRun]) -> list[Doubt]:
    """Return why losses may not be compared: other vocabulary, other data, other lengths."""

    def values(key: str) -> set[str]:
        return {run.config[key] for run in runs if key in run.config}

    found = []
    if len(values("model.vocab_size")) > 1:
        found.append(
            Doubt(
                "Losses are not comparable: the runs have different vocabularies (model.vocab_size "
                f"{', '.join(sorted(values('model.vocab_size')))}), and a nat per token of one is not a nat per token "
                "of another. Compare bits per byte: launch/evaluate.py perplexity.",
                spoils_losses=True,
            )
        )
    digests = {run.dataset["digest"] for run in runs if run.dataset.get("digest")}
    if len(digests) > 1:
        found.append(
            Doubt(
                f"Losses are not comparable as they stand: the runs read {len(digests)} different data sets (data "
                "digest), so each loss is of other text, and the tokens may be another tokenizer's. Compare bits per "
                "byte on one text: launch/evaluate.py perplexity --data.",
                spoils_losses=True,
            )
        )
    if len(values("data.seq_len")) > 1:
        found.append(Doubt("data.seq_len differs: tokens that see more before them are easier to predict."))
    if len(values("train.steps")) > 1 and values("optim.schedule") != {"constant"}:
        found.append(
            Doubt(
                "train.steps differs: at equal tokens the runs are at different places of their learning rate "
                "schedules, and a run whose rate has already fallen has the lower loss."
            )
        )
    if len(values("validation.samples")) > 1:
        found.append(Doubt("validation.samples differs: loss/val is of other samples, and differs for that alone."))
    for run in runs:
        if keys := [key for key in run.changed if not key.startswith(_WITHOUT_EFFECT)]:
            named = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            found.append(
                Doubt(
                    f"{run.name} went on with other settings after a resume ({named}): the table of what differs shows "
                    "the last ones, and its losses come of both."
                )
            )
    forced = sorted({run.tags["routing"] for run in runs if "forced" in run.tags.get("routing", "")})
    if forced:
        found.append(Doubt(f"Some runs have forced routing ({', '.join(forced)}): a benchmark, which learns little."))
    return found
