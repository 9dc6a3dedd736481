"""`evaluate.py kv-cache`: the table of gptoss_502m, sizes of caches that were used, and what is left behind."""

import json
from pathlib import Path

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.evaluation.kv_cache_size import MIB, analytic, row
from gptoss_dist.model.init import initialize
from gptoss_dist.model.kv_cache import KVCache
from launch.evaluate import main
from tests.support.ranks import MODEL, ROOT

MODEL_FILE = str(ROOT / "configs/model/gptoss_502m.yaml")


@pytest.mark.parametrize(
    ("tokens", "full_mib", "ratio"),
    [(4096, 72.0, "1.94"), (16384, 288.0, "1.98"), (65536, 1152.0, "2.00"), (131072, 2304.0, "2.00")],
)
def test_the_table_of_gptoss_502m(tokens, full_mib, ratio):
    found = row(ModelConfig.from_yaml(MODEL_FILE), tokens, 1, torch.bfloat16)
    assert found["full_bytes"] == found["measured_full_bytes"] == full_mib * MIB
    assert found["bytes"] == found["measured_bytes"] == full_mib * MIB / 2 + 6 * 128 * 1536
    assert f"{found['ratio']:.2f}" == ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 16, 17, 50])
@torch.no_grad()
def test_a_cache_that_a_model_filled_holds_what_the_formula_says(tokens, dtype):
    config = ModelConfig(**MODEL)
    model = GptOss(config)
    initialize(model, seed=0)
    model.to(dtype).eval()
    cache = KVCache(config, capacity=tokens)
    for part in torch.zeros(3, tokens, dtype=torch.long).split(9, dim=1):
        model(part, cache=cache)
    assert cache.nbytes() == analytic(config, tokens, 3, dtype)


@pytest.mark.heavy
def test_the_command_prints_the_table_and_leaves_files_and_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tmp_path / "result"
    options = ["kv-cache", "--model", MODEL_FILE, "--lengths", "4096", "--lengths", "16384", "--output", str(folder)]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "37.125" in out and "1.94x" in out and "1.98x" in out and "288.000" in out
    result = json.loads((folder / "result.json").read_text())
    assert [one["tokens"] for one in result["rows"]] == [4096, 16384]
    assert (folder / "kv_cache.png").read_bytes().startswith(b"\x89PNG")

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.data.metrics["eval/kv_cache/ratio_4096"] == pytest.approx(1.939, abs=1e-3)
    assert {"result.json", "kv_cache.png"} <= {Path(one.path).name for one in client.list_artifacts(run.info.run_id)}

    assert main(options) == 2 and "exists already" in capsys.readouterr().err
    assert main(["kv-cache", "--model", MODEL_FILE, "--lengths", "0"]) == 2
    assert "lengths=0 must be positive" in capsys.readouterr().err
