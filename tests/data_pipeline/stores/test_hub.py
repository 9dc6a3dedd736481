"""Files behind `hf://`, through Hugging Face's own client, from a hub on this machine."""

import subprocess
import sys

import pytest

from data_pipeline import Manifest
from tests.support import hub, stand_ins
from tests.support.ranks import environment

pytestmark = pytest.mark.distributed
SPEC = "hf://datasets/bigcode/the-stack-dedup/data/python/*.parquet"


def test_files_of_a_gated_dataset_with_a_token_and_without(tmp_path):
    stand_ins.stack(tmp_path / "hub/bigcode/the-stack-dedup", seed=1)
    texts = ["--text-column", "content", "--tokenizer", "bytes", "--validation-fraction", "0"]
    line = [sys.executable, "-m", "data_pipeline.prepare", SPEC, "--output", "data/python", *texts]

    def prepare(token: str) -> subprocess.CompletedProcess:
        own = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        variables = environment(**own)
        return subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)

    with hub.running(tmp_path / "hub", token="t0ken") as server:
        refused = prepare("")
        assert refused.returncode == 2 and "set HF_TOKEN" in refused.stderr and refused.stderr.count("\n") == 1
        done = prepare("t0ken")
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / "data/python").documents("train") == stand_ins.DOCUMENTS
    asked = {path for _, path, authorization in server.asked if authorization == "Bearer t0ken"}
    assert any("/resolve/" in path and path.endswith(".parquet") for path in asked)
    written = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not any(b"t0ken" in data for data in written)
