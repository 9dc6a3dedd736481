"""EleutherAI's harness evaluates an exported model (extra `eval`), on a task of its own and without the network."""

import json
import shlex
import subprocess
import sys

import pytest
import yaml

from tests.support.ranks import environment, run

pytest.importorskip("lm_eval", reason="needs sh launch/install.sh --extras test,eval")
pytest.importorskip("transformers")

pytestmark = pytest.mark.distributed


def test_the_harness_runs_on_an_exported_model(settings, tmp_path):
    run("launch/train.py", "--config", str(settings), "--train.steps", "40", "--optim.lr", "0.01")
    run("launch/convert.py", "export", str(tmp_path / "tiny"), "--output", str(tmp_path / "model"))
    rows = [{"question": "the sum of", "choices": [" the", "\u4e16\u754c"], "answer": 0}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    line = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'model'}",
        *shlex.split(
            f"--tasks local --include_path {tmp_path / 'tasks'} --device cpu --output_path {tmp_path / 'results'}"
        ),
    ]
    offline = environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=offline)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    # English letters against Chinese ones, of which the corpus has none.
    assert json.loads(results.read_text())["results"]["local"]["acc,none"] == 1.0
