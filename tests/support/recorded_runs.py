"""Folders of runs that nobody trained: metrics by a formula, as a run of the tracker leaves them."""

import json
from pathlib import Path

import numpy as np
import yaml

TOKENS_PER_STEP = 4096
FLOPS_PER_TOKEN = 1.5e9
CONFIG = {
    "run": {"name": "made-up", "seed": 0},
    "model": {"vocab_size": 512, "hidden_size": 64},
    "data": {"path": "data/x", "seq_len": 256},
    "train": {"steps": 400, "micro_batch_size": 4},
    "optim": {"lr": 0.001, "schedule": "cosine"},
    "tracking": {"mlflow": False},
}


def law(tokens, floor=1.5, factor=40.0, exponent=0.3):
    """A loss that falls with tokens."""
    return floor + factor * np.asarray(tokens, float) ** -exponent


def noise(steps, std, seed, correlation=0.0):
    """Noise of an autoregression of first order, with standard deviation `std`."""
    fresh = np.random.default_rng(seed).normal(0, std * np.sqrt(1 - correlation**2), steps)
    fresh[0] /= np.sqrt(1 - correlation**2)
    for index in range(1, steps):
        fresh[index] += correlation * fresh[index - 1]
    return fresh


def write_run(
    folder: Path,
    *,
    steps=400,
    shift=0.0,
    std=0.02,
    seed=0,
    correlation=0.0,
    config=None,
    digest="d" * 64,
    validate_every=100,
    losses=None,
    tokens_per_step=TOKENS_PER_STEP,
    flops_per_token=FLOPS_PER_TOKEN,
    seconds_per_step=9.0,
    more=None,
):
    """Write a run whose loss is a law of the tokens plus `shift` and noise; return its losses, [steps]."""
    folder.mkdir(parents=True)
    tokens = tokens_per_step * np.arange(1, steps + 1)
    if losses is None:
        losses = law(tokens) + shift + noise(steps, std, seed, correlation)
    flat = {**{f"{part}.{key}": value for part, values in CONFIG.items() for key, value in values.items()}}
    flat |= {"run.name": folder.name, "run.seed": seed, **(config or {})}
    tree: dict = {}
    for key, value in flat.items():
        part, name = key.split(".")
        tree.setdefault(part, {})[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    start = {
        "op": "run",
        "time": 1000.0,
        "uid": "0a" * 16,
        "run_name": folder.name,
        "experiment": "made-up",
        "params": {key: str(value) for key, value in flat.items()},
        "tags": {"git.sha": "abc", "world_size": "2", "flops_per_token": str(flops_per_token), "routing": "learned"},
        "dataset": {"name": "x", "digest": digest, "source": "data/x"},
        "resume": 0,
        "resumed_step": None,
    }
    (folder / "tracking").mkdir()
    end = {"op": "end", "time": 1000.0 + steps * seconds_per_step, "status": "FINISHED"}
    (folder / "tracking/journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (start, end)))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            at, loss = 1000.0 + step * seconds_per_step, float(losses[step - 1])
            metrics = {
                "loss/train": loss,
                "progress/tokens": int(tokens[step - 1]),
                "progress/exaflops": float(tokens[step - 1]) * flops_per_token / 1e18,
                "perf/tokens_per_s": tokens_per_step / seconds_per_step,
                "perf/mfu": 0.25,
                "optim/grad_norm": 1.0 + 1.0 / step,
                "optim/skipped_steps": 0.0,
                "moe/load_cv": 0.3,
                "moe/dead_experts": 0.0,
            }
            for name, values in (more or {}).items():
                metrics[name] = float(values[step - 1])
            file.write(json.dumps({"step": step, "time": at, "metrics": metrics}) + "\n")
            if validate_every and step % validate_every == 0:
                value = float(law(tokens[step - 1]) + shift + 0.05)
                validated = {"loss/val": value, "loss/val_ppl": float(np.exp(value)), "loss/val_best": value}
                file.write(json.dumps({"step": step, "time": at + 1, "metrics": validated}) + "\n")
    return np.asarray(losses)
