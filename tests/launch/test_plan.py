"""The planner as a user calls it: what it prints, writes, proposes and refuses."""

import functools
import json
import re

import pytest

from gptoss_dist.config import load_config
from gptoss_dist.planner import search
from launch.plan import main
from tests.support.ranks import run

pytestmark = pytest.mark.heavy
GIB = 2**30


def plan(capsys, *words: str, expect: int = 0) -> str:
    """Run the command in this process; return what it printed."""
    assert main(list(words)) == expect
    out, err = capsys.readouterr()
    assert not err
    return out


def numbers(line: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(r"\d[\d,]*\.?\d*", line)]


@pytest.mark.distributed
def test_the_502m_model_on_one_a100():
    options = "--config configs/pretrain_502m_a100.yaml --gpus 1 --gpu a100-80gb --train.activation_checkpointing 1"
    said = run("launch/plan.py", *options.split(), "--train.gradient_accumulation", "1").stdout
    for expected in (
        "machines     1 x a100-80gb on 1 machine\n",
        "501,836,640 total, 247,032,672 active per token",
        "8 x 1 accumulated x 1 processes x 4,096 tokens = 32,768 tokens per step, 1,998,848,000 in 61,000 steps",
        "of 79.25: fits\n",
        "checkpoint 5.6 GiB",
    ):
        assert expected in said, said
    assert "traffic" not in said and "MFU" in said and len(said.splitlines()) <= 25


def test_text_json_and_picture_say_the_same(settings, tmp_path, capsys):
    files = {name: tmp_path / f"plan.{name}" for name in ("json", "png")}
    said = plan(
        capsys,
        *f"--config {settings} --gpus 16 --nodes 4 --gpu h100-80gb --interconnect roce-200".split(),
        *f"--train.precision bf16 --parallel.replicate 4 --parallel.expert_parallel 4 --json {files['json']}".split(),
        *f"--picture {files['png']}".split(),
    )
    values = json.loads(files["json"].read_text())
    assert set(values) == {
        "machines",
        "devices",
        "nodes",
        "gpu",
        "steps",
        "seq_len",
        "micro_batch_size",
        "gradient_accumulation",
        "precision",
        "activation_checkpointing",
        "compile",
        "parameters",
        "engine",
        "layout",
        "tokens_per_step",
        "memory",
        "traffic",
        "time",
        "checkpoint",
        "data_bytes",
    }
    assert values["layout"] == {"replicate": 4, "shard": 4, "expert_parallel": 4, "context_parallel": 1}
    assert values["tokens_per_step"] == 2 * 2 * 16 * 48
    memory, time = values["memory"], values["time"]
    # Two moments for each weight, and a count of steps for each parameter.
    assert memory["holds"]["optimizer"] == pytest.approx(2 * memory["holds"]["weights"], rel=1e-2)
    assert memory["peak"] == max(sum(kinds.values()) for kinds in memory["by_phase"].values())
    assert memory["peak"] < memory["needed"] < memory["limit"] == pytest.approx(79.65 * GIB, rel=1e-2)
    assert values["checkpoint"]["bytes"] == 12 * values["parameters"]["total"]
    assert time["hours"] == pytest.approx(12 * time["step_s"] / 3600)
    assert time["tokens_per_s_per_device"] == pytest.approx(2 * 2 * 48 / time["step_s"])
    lines = said.splitlines()
    assert lines[0] == f"machines     {values['machines']}" == "machines     16 x h100-80gb on 4 machines, roce-200"
    sums = next(line for line in lines if "sum at the peak" in line)
    phases = memory["by_phase"].values()
    assert numbers(sums) == pytest.approx([sum(kinds.values()) / GIB for kinds in phases], abs=6e-4)
    verdict = numbers(next(line for line in lines if line.endswith(": fits")))
    assert verdict == pytest.approx(
        [
            memory["peak"] / GIB,
            (memory["needed"] - memory["peak"]) / GIB,
            memory["needed"] / GIB,
            memory["limit"] / GIB,
        ],
        abs=6e-3,
    )
    assert numbers(next(line for line in lines if line.startswith("time")))[0] == pytest.approx(
        time["step_s"], abs=6e-4
    )
    # Replicas sit on machines of their own, so that gradients cross between them, and rows of experts do not.
    kinds = {(traffic["kind"], traffic["ranks"]): traffic for traffic in values["traffic"]}
    assert kinds["all-to-all", 4]["nodes"] == 1 and kinds["all-to-all", 4]["between"] == 0
    assert kinds["all-reduce", 4]["between"] == kinds["all-reduce", 4]["sent"] > 0
    assert len([line for line in lines if " GiB sent in " in line]) == len(values["traffic"])
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_says_so_and_exits_with_1(settings, capsys):
    options = f"--config {settings} --gpus 1 --gpu a100-80gb --train.precision bf16 --memory 1".split()
    said = plan(capsys, *options, expect=1)
    peak, margin, needed, limit = numbers(next(line for line in said.splitlines() if "DOES NOT FIT" in line))
    assert limit == 1 < needed == pytest.approx(peak + margin, abs=0.011)


def test_float32_is_planned_for_a_gpu_too(settings, capsys):
    """torch's shape function of grouped products knows bf16 only."""
    said = plan(capsys, *f"--config {settings} --gpus 2 --gpu h100-80gb --model.hidden_size 64".split())
    assert "grouped products" in said and "fp32" in said


WRONG = {
    "--gpus 1 --gpu foo": "gpu='foo' is unknown; use one of a10, ",
    "--gpus 10 --nodes 3 --gpu h100-80gb": "--gpus 10 cannot be split over --nodes 3; name another number",
    "--gpus 9 --gpu h100-80gb": "--gpus 9 cannot be split over 2 machines of at most 8; give --nodes",
    "--gpus 0 --gpu h100-80gb": "gpus=0 must be 1 or more",
    "--gpus 1": "no device is named; give --gpu, such as h100-80gb, or --hardware FILE",
    "--gpus 1 --gpuu h100-80gb": "unrecognized option --gpuu; did you mean --gpu?",
    "--gpus 1 --gpu h100-80gb --train.stepz 3": "--train.stepz 3; did you mean --train.steps?",
    "--gpu h100-80gb": "--gpus GPUS; see plan.py --help",
    "--gpus 4 --gpu h100-80gb --interconnect foo": "'foo' is unknown; use one of ib-200, ",
    "--gpus 3 --gpu h100-80gb --parallel.expert_parallel 2": "parallel.expert_parallel=2 must divide ",
    "--gpus 2 --gpu h100-80gb --memory nan": "memory=nan must be a number",
    "--gpus 2 --gpu h100-80gb --search --output {exists}": "--output {exists} exists already; name another file",
    "--gpus 2 --gpu h100-80gb --output {new}": "--output {new} is for a search; add --search",
    "--gpus 2 --gpu h100-80gb --global-batch 8": "--global-batch 8 is for a search; add --search",
    "--gpus 2 --gpu h100-80gb --json {nowhere}": "--json {nowhere}: there is no folder {folder}; make it",
    "--gpus 2 --gpu h100-80gb --picture {nowhere}": "--picture {nowhere}: there is no folder {folder}; make it",
    "--gpus 8 --gpu h100-80gb --search --global-batch 12": "a global batch of 12 samples cannot be split over 8",
    "--gpus 1 --hardware {nowhere}": "{nowhere} cannot be read: No such file or directory",
    "--gpus 1 --hardware {exists}": "{exists}: ",
    "--gpus 1 --hardware {broken}": "{broken}",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_one_line(settings, tmp_path, capsys, words):
    files = {name: tmp_path / f"{name}.yaml" for name in ("exists", "new", "broken")}
    files |= {"folder": tmp_path / "none", "nowhere": tmp_path / "none" / "file"}
    files["exists"].write_text("device: cpu\n")
    files["broken"].write_text("device: [\n")
    try:
        code = main([*f"--config {settings}".split(), *words.format(**files).split()])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and len(err) < 900, err
    assert err.startswith("plan.py: ") and WRONG[words].format(**files) in err, err
    assert not files["new"].exists()


def test_operators_are_listed(capsys):
    options = "--model configs/model/tiny.yaml --gpu h100-80gb --seq-len 256"
    said = plan(capsys, "operators", *options.split())
    assert "_grouped_mm" in said and "_flash_attention" in said


@pytest.mark.distributed
def test_a_search_returns_layouts_that_fit_for_the_same_batch(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "search", functools.partial(search.search, wanted=2))
    monkeypatch.setattr(search, "TRACED_PER_WANTED", 1)
    best, found, again = (tmp_path / name for name in ("best.yaml", "found.json", "again.json"))
    machines = "--gpus 2 --gpu h100-80gb"
    said = plan(
        capsys,
        *f"--config {settings} {machines} --train.precision bf16 --search --output {best} --json {found}".split(),
    )
    table = said.partition("s/step")[2].splitlines()[1:3]
    rows = [
        re.fullmatch(r"  (.+?) +(\d+) x (\d+) +(\d+) +(\d+) x (\d+) +(\d) +([\d.]+) +([\d,]+) +([\d.]+)", row)
        for row in table
    ]
    assert all(rows), said
    values = [[float(group.replace(",", "")) for group in row.groups()[1:]] for row in rows]
    assert all(v[0] * v[1] == 2 and v[3] * v[4] == 2 * 2 for v in values), said
    assert [v[7] for v in values] == sorted((v[7] for v in values), reverse=True) and max(v[8] for v in values) < 79
    config = load_config(best)
    assert (config.train.micro_batch_size, config.train.gradient_accumulation) == tuple(values[0][3:5])
    assert config.data.seq_len == 48 and config.train.steps == 12
    plan(capsys, *f"--config {best} {machines} --json {again}".split())
    assert json.loads(again.read_text()) == json.loads(found.read_text())


@pytest.mark.distributed
def test_a_search_in_which_nothing_fits_exits_with_1(settings, tmp_path, capsys):
    output = tmp_path / "best.yaml"
    options = f"--config {settings} --gpus 2 --gpu h100-80gb --train.precision bf16 --search --memory 1".split()
    said = plan(capsys, *options, "--output", str(output), expect=1)
    assert "none of those that were traced fits" in said and "of 1.0 GiB (estimated)" in said
    assert not output.exists()
