"""A long prompt takes memory for its keys and values, and for one chunk: never for a matrix of tokens by tokens."""

import json
import subprocess
import sys

import pytest

from tests.support.ranks import ROOT, environment

MIB = 2**20


def measure(tokens: int) -> dict:
    line = [sys.executable, "-m", "tests.support.prefill", str(tokens)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=1800)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.distributed
def test_12288_tokens_need_no_matrix_of_all_scores():
    found = measure(12288)
    assert found["peak"] - found["before"] < 300 * MIB  # the scores of one layer are 2,304 MiB, a mask of bool 144


@pytest.mark.slow
def test_65536_tokens_on_a_model_of_12_layers():
    short, long = measure(16384), measure(65536)
    assert long["peak"] < 6 * 1024 * MIB
    assert long["cache"] == 6 * (65536 + 128) * 2 * 2 * 16 * 4
    assert long["peak"] - short["peak"] < long["cache"] - short["cache"] + 128 * MIB
    assert long["cpu_seconds"] / 65536 <= 4 * short["cpu_seconds"] / 16384
