"""Wrong command lines of the benchmarks: one line that names option, value and remedy, before anything starts."""

import sys

import pytest

import launch.plan
from launch.benchmarks import against_transformers, checkpoints, data, engines, harness, plan

NUMBERS = ("0", "-1", "x", "1.5", "nan", "inf", "1e400", "", "9" * 5000, str(2**64))
WRONG = {
    (against_transformers, "moe"): [
        [f"--{name}={n}"] for name in ("rounds", "steps", "tokens", "top-k") for n in NUMBERS
    ],
    (against_transformers, "train"): [
        ["--precision", "fp16"],
        ["--seq-len"],
        ["--seqlen=5"],
        ["--experts", ""],
        ["more"],
    ],
    (against_transformers, "decode"): [
        *([f"--{name}={n}"] for name in ("rounds", "prompt", "new-tokens", "long-prompt") for n in NUMBERS),
        ["--batch-sizes", "1", "0"],
        ["--peers", "flash"],
        ["--precision", "fp16"],
    ],
    (checkpoints, None): [[f"--{name}={n}"] for name in ("processes", "every", "rounds") for n in NUMBERS],
    (harness, None): [
        [f"--{name}={n}", *["--checkpoint", "a", "--export", "b", "--include", "c", "--tasks", "d"]]
        for name in ("limit", "rounds", "threads", "batch-sizes")
        for n in NUMBERS
    ],
    (engines, None): [["--processes", n] for n in NUMBERS] + [["--precision", "both"], ["--step=3"]],
    (plan, "steps"): [[f"--{name}={n}"] for name in ("threads", "steps", "cases") for n in NUMBERS] + [["--hardware"]],
    (data, "load"): [[f"--gigabytes={n}"] for n in ("0", "-1", "x", "nan", "inf", "1e400")] + [["--only", "x"]],
}


@pytest.mark.parametrize(("program", "verb"), WRONG)
def test_wrong_command_lines(monkeypatch, capsys, program, verb):
    for words in WRONG[program, verb]:
        argv = [*([verb] if verb else []), *words]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv])
        with pytest.raises(SystemExit) as end:
            program.main() if program is data else program.main(argv)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out and err.count("\n") == 1 and len(err) < 900, (argv, err)
        assert words[0].partition("=")[0] in err, (argv, err)


def test_what_was_meant(capsys):
    for argv, meant in ((["moe", "--round=3"], "--rounds"), (["train", "--seqlen=3"], "--seq-len")):
        with pytest.raises(SystemExit):
            against_transformers.main(argv)
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_published_run_and_a_file_of_hardware_that_are_not_there(tmp_path, capsys):
    for main, argv in (
        (launch.plan.main, ["published", "--runs", "llama-4"]),
        (plan.main, ["steps", "--hardware", str(tmp_path / "none.yaml")]),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and argv[-1] in err
