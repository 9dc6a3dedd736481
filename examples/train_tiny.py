"""Train a tiny model from Python: prepare text, fill the settings, run, read what was recorded.

    python examples/train_tiny.py
    python examples/train_tiny.py --folder elsewhere --steps 300

Whatever a command line of this project does, two calls do as well. `data_pipeline.prepare` turns text into a folder of
shards; it answers "already prepared" if it is given again. `load_config` reads YAML files and lays values over them,
with the same checks and messages as `--section.field value`; `run` trains as they say, in this process or in every
process of a launcher. Everything that a run leaves is in its folder, as text or as safetensors: the settings, one line
of JSON for each step, checkpoints and samples.
"""

import argparse
import sys
from pathlib import Path

from data_pipeline.prepare.__main__ import main as prepare
from gptoss_dist.config import load_config
from gptoss_dist.distributed.processes import shut_down
from gptoss_dist.tracking.tracker import read_metrics
from gptoss_dist.train.loop import run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="train_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default=".", help="where `data/tiny` and `runs/tiny` go (here)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    arguments = parser.parse_args(argv)
    data, folder = Path(arguments.folder, "data/tiny"), Path(arguments.folder, "runs/tiny")

    # 1,000 documents of invented sentences, which are the same everywhere. A fifth of them is held out.
    options = ["--tokenizer", "bytes", "--max-documents", "1000", "--validation-fraction", "0.2"]
    if code := prepare(["synthetic", "--output", str(data), *options]):
        return code

    config = load_config(
        Path(__file__).with_name("tiny.yaml"),
        overrides={"data.path": data, "run.dir": folder, "train.steps": arguments.steps, "resume": "auto"},
    )
    code = run(config)
    if code == 0:
        losses = [row["metrics"]["loss/train"] for row in read_metrics(folder) if "loss/train" in row["metrics"]]
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps; see {folder}")
    shut_down(code)  # ends the process: a finished run must not fail while the interpreter is torn down


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
