"""The benchmarks' commands start, and their common protocol counts as it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks import against_transformers, checkpoints, decode, engines
from launch.benchmarks.protocol import QUICKSTART, Spread, run_worker

LAUNCH = Path(__file__).parents[2] / "launch"


COMMANDS = ["benchmark", "benchmark_data", "benchmark_engines", "benchmarks/checkpoints", "benchmarks/plan"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_start_from_any_folder(tmp_path, command):
    line = [sys.executable, LAUNCH / f"{command}.py", "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_medians_are_given_with_what_was_seen():
    assert f"{Spread.of([3.0, 1.0, 2.0, 9.0]):.1f}" == "2.5 (1.0 to 9.0)"
    ratio = Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert ratio == Spread(median=2.0, least=1.0, most=3.0) and ratio.range(".0f") == "1 to 3"
    with pytest.raises(ValueError, match="zip"):
        Spread.of_ratios([1.0], [1.0, 2.0])
    assert QUICKSTART.is_file()


def test_what_a_worker_found_is_on_its_last_line():
    program = "import sys; print('a line'); print('{\"seconds\": 2}'); print('a warning', file=sys.stderr)"
    assert run_worker("x", [sys.executable, "-c", program]) == {"seconds": 2}
    with pytest.raises(SystemExit, match=r"(?s)x failed:.*no such thing"):
        run_worker("x", [sys.executable, "-c", "raise ValueError('no such thing')"])


def test_what_a_worker_says_meanwhile_is_passed_on(capsys):
    program = (
        "from launch.benchmarks.protocol import progress; import sys; progress('one of two turns'); "
        "print('a warning', file=sys.stderr); print('{}')"
    )
    assert run_worker("x", [sys.executable, "-c", program], {"PYTHONPATH": str(LAUNCH.parent)}) == {}
    assert capsys.readouterr().err == "benchmark: one of two turns\n"


def take_turns(monkeypatch, words: list[str], turn) -> list[dict]:
    """The rounds of two workers that a function stands in for."""
    monkeypatch.setattr(against_transformers, "turn", lambda worker, steps: turn(worker))
    arguments = against_transformers.build_parser(words).parse_args(words)
    return against_transformers.take_turns(arguments, {("fp32", name): name for name in ("ours", "theirs")})


def test_each_turn_is_said_before_the_next_begins(monkeypatch, capsys):
    said = []

    def turn(worker):
        said.append(capsys.readouterr().err)
        return {"s_per_step": 2.0 if worker == "ours" else 0.25}

    assert len(take_turns(monkeypatch, ["moe", "--rounds", "1"], turn)) == 2
    assert said[:2] == ["", "benchmark: fp32 ours: 2 s per step (warms up)\n"]
    assert said[2].startswith(
        "benchmark: fp32 theirs: 0.25 s per step (warms up)\nbenchmark: 1 of 2 rounds after 0 s; "
    )
    assert said[3] == "benchmark: fp32 ours: 2 s per step\n"


def test_an_interrupted_benchmark_reports_its_whole_rounds(monkeypatch, capsys):
    turns = iter(range(100))

    def turn(worker):
        if next(turns) == 7:
            raise KeyboardInterrupt
        return {"s_per_step": 1.0}

    assert len(take_turns(monkeypatch, ["moe"], turn)) == 3
    assert capsys.readouterr().err.endswith("benchmark: interrupted: of 2 whole rounds\n")
    turns = iter(range(6, 100))
    with pytest.raises(SystemExit, match="interrupted before the first round was done"):
        take_turns(monkeypatch, ["moe"], turn)


@pytest.mark.parametrize(
    "module, command, size",
    [
        (against_transformers, ["moe"], "tokens"),
        (against_transformers, ["train"], "seq_len"),
        (against_transformers, ["decode"], "prompt"),
        (checkpoints, [], "every"),
        (engines, [], "hidden_size"),
    ],
)
def test_a_quick_size_that_single_options_overrule(module, command, size):
    def parsed(*words):
        return vars(module.build_parser([*command, *words]).parse_args([*command, *words]))

    usual, quick = parsed(), parsed("--quick")
    assert quick["rounds"] < usual["rounds"] and quick[size] < usual[size]
    assert parsed("--quick", f"--{size.replace('_', '-')}", "77") == quick | {size: 77}


def generated(monkeypatch, capsys, their_ids: list[int], *words: str) -> str:
    """What `decode` prints of two rounds behind one that warms up; ours takes 1 s, theirs 2 s and then 3 s."""
    words = ("decode", "--rounds", "2", "--batch-sizes", "1", "--new-tokens", "3", "--peers", "grouped_mm", *words)
    arguments = against_transformers.build_parser(list(words)).parse_args(words)
    turns = {"ours": iter([9.0] * 2 + [1.0] * 4), "theirs": iter([9.0] * 2 + [2.0] * 2 + [3.0] * 2)}

    def turn(worker, index):
        seconds, new = next(turns[worker]), [3, 1][index]
        return {"first": seconds, "rest": seconds, "ids": [([1, 2, 3] if worker == "ours" else their_ids)[:new]]}

    monkeypatch.setattr(decode, "turn", turn)
    done = decode.take_turns(arguments, "fp32", {decode.OURS: "ours", "grouped_mm": "theirs"})
    decode.report(arguments, ["grouped_mm"], "a model", done, exact=True)
    return capsys.readouterr().out


def test_generation_is_compared_by_tokens_and_by_the_first_token(monkeypatch, capsys):
    said = generated(monkeypatch, capsys, [1, 2, 3])
    assert "gptoss_dist                              2.0 tok/s" in said
    assert "gptoss_dist is 2.50 (2.00 to 3.00) times as fast as transformers grouped_mm" in said
    assert "1 x 4,096 tokens, 1 new: seconds to the first token" in said and "1.000 s" in said and "2.500 s" in said


def test_another_text_is_no_comparison(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="other text than ours: transformers grouped_mm, 1 x 1,024 tokens, 3 new"):
        generated(monkeypatch, capsys, [1, 9, 3])
    assert "(text differs after 1 tokens)" in capsys.readouterr().out


def test_what_does_not_work_of_transformers_is_said_and_left_out(monkeypatch, capsys):
    words = ["decode", "--rounds", "1", "--batch-sizes", "1", "--peers", "eager"]
    arguments = against_transformers.build_parser(words).parse_args(words)
    monkeypatch.setattr(decode, "turn", lambda worker, index: worker.answer)
    ours, theirs = ({"first": 1.0, "rest": 1.0, "ids": [[1]]}, {"failed": "ImportError: no such thing"})
    workers = {
        name: type("Worker", (), {"answer": answer, "kill": lambda self: None})()
        for name, answer in ((decode.OURS, ours), ("eager", theirs))
    }
    done = decode.take_turns(arguments, "fp32", workers)
    assert list(workers) == [decode.OURS]
    assert "fp32 transformers eager does not work here: ImportError: no such thing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing to compare with"):
        decode.report(arguments, [], "a model", done, exact=True)
