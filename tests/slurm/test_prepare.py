"""On a real SLURM of two nodes: a corpus prepared by an array of jobs is the one that a single process prepares."""

import json
import re
from pathlib import Path

import pytest

from data_pipeline import open_source
from tests.slurm.lab import Lab
from tests.support.prepared import contents, run

pytestmark = [pytest.mark.distributed, pytest.mark.slurm]


def test_an_array_and_a_last_job_make_the_same_bytes_whatever_is_killed(lab: Lab, tmp_path: Path):
    """One element is cancelled in the middle: the last job does its parts."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(9):
        texts = open_source(f"synthetic:documents=150,seed={index}").documents()
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "slow_filter_slurm.py").write_text(
        "import time\n\ndef keep(text):\n    time.sleep(0.01)\n    return True\n"
    )
    options = [folder, "--filter", "slow_filter_slurm:keep", "--allow-code", tmp_path / "slow_filter_slurm.py"]
    log = f"--output={lab.folder}/log/job-%A_%a.log"
    words = ["--array=0-2", log, "--", *options, "--output", tmp_path / "data"]
    said = lab("bash", "launch/slurm/prepare.sbatch", *words)
    array, last = re.findall(r"^job (\d+):? ", said, re.MULTILINE)
    preparing = tmp_path / "data.preparing"
    lab.await_(lambda: (preparing / "ranges/1-of-3/.lock").exists(), "element 1")
    lab.await_(lambda: len(list(preparing.glob("*.json"))) > 1, "a part")
    lab("scancel", f"{array}_1")
    lab.await_end(last, "COMPLETED")
    assert run(*options, "--output", tmp_path / "whole") == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "whole") and not preparing.exists()
    said = lab.log_of(last)
    done = int(re.search(r"continuing: (\d) of 9 parts are done already", said)[1])
    assert 6 <= done < 9, said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the words of `prepare` are missing: bash launch/slurm/prepare.sbatch --array=0-15"),
        (("--array=0-2", "synthetic", "--output", "x"), "the words of `prepare` are missing"),
        (("--time=1", "--", "synthetic", "--output", "x"), "--array=: must be one range before `--`"),
        (("--array=0,2,5", "--", "synthetic", "--output", "x"), "--array=0,2,5: must be one range"),
        (
            ("-a", "0-2", "--", "synthetic", "--output", "x", "--part-range", "0/3"),
            "--part-range: is given by prepare.sbatch",
        ),
        (("-a", "0-2", "--", "synthetic", "--output", "x", "--part_range=0/3"), "--part-range: is given by prepare"),
        (("-a", "0-2", "--", "synthetic"), "required: --output"),
        (("-a", "0-2", "--", "synthetic", "--output", "x", "--workers", "0"), "workers=0 must be"),
        (("--array=0-2", "--", "synthetic", "--outputs", "x"), "--outputs"),
    ],
)
def test_mistakes_submit_nothing(lab: Lab, words, message):
    before = lab("squeue", "-h", "--states=all", "-o", "%i")
    assert message in lab("bash", "launch/slurm/prepare.sbatch", *words, code=2)
    assert lab("squeue", "-h", "--states=all", "-o", "%i") == before


def test_what_asks_for_no_dataset_submits_nothing(lab: Lab):
    before = lab("squeue", "-h", "--states=all", "-o", "%i")
    words = ["-a", "0-2", "--", "synthetic", "--output", "x"]
    assert "output: x" in lab("bash", "launch/slurm/prepare.sbatch", *words, "--print_config")
    assert "--max-documents" in lab("bash", "launch/slurm/prepare.sbatch", *words, "--help")
    assert lab("squeue", "-h", "--states=all", "-o", "%i") == before
