"""What `--print_config` prints of each shipped run, held against files: a change of names, defaults or order shows.

After an intended change write them anew: `python tests/config/test_print_config.py`.
"""

import contextlib
import io
import os
from pathlib import Path

import pytest

from gptoss_dist.config import build_parser

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("print_config")
RUNS = {path.stem: ["--config", f"configs/{path.name}"] for path in sorted(ROOT.glob("configs/*.yaml"))}
RUNS["options"] = [
    *("--config", "configs/quickstart.yaml", "--train.steps", "7", "--optim.betas", "[0.8, 0.9]"),
    *("--data.path", "null", "--data.sources", "[{path: a, weight: 2}, {path: b, name: other, weight: 1}]"),
    *("--data.stages", "[{from_step: 3, weights: {a: 1}}]", "--engine.deepspeed", "{zero_optimization: {stage: 3}}"),
    *("--optim.lr_scale", '{"*.router.*": 0.1}', "--init.from", "hf:folder", "--model.num_local_experts", "4"),
]


def printed(arguments: list[str]) -> str:
    before, output = os.getcwd(), io.StringIO()
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
            build_parser().parse_args([*arguments, "--print_config"])
    finally:
        os.chdir(before)
    assert end.value.code in (0, None)
    return output.getvalue()


@pytest.mark.parametrize("name", RUNS)
def test_print_config_stays_as_it_is(name):
    assert printed(RUNS[name]) == (GOLDEN / f"{name}.yaml").read_text()


def test_no_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(RUNS)


if __name__ == "__main__":
    for name, arguments in RUNS.items():
        (GOLDEN / f"{name}.yaml").write_text(printed(arguments))
