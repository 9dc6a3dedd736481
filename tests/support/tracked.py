"""Trackers that deliver at once, and what MLflow has of their runs."""

from gptoss_dist.tracking.tracker import Tracker


def start(run_dir, **options):
    defaults = {
        "run_name": "unit",
        "experiment": "tests",
        "params": {"optim.lr": 3e-4, "odd[key]": True},
        "tags": {"git.sha": "abc"},
        "dataset": {"name": "stdlib", "digest": "d" * 64, "source": "data/stdlib"},
        "interval_s": 0.05,
    }
    return Tracker(run_dir, **(defaults | options))


def runs_of(client, experiment="tests"):
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def history(client, run_id, key):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
