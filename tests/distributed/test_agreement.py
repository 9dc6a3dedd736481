"""Ranks compare what must be the same everywhere, and the odd one out is named."""

import json
import sys

import pytest

from gptoss_dist.distributed.agreement import Fact, check_agreement, source_digest
from tests.support.ranks import run

HOSTS = ["node1", "node1", "node2", "node2", "node3"]

SCRIPT = """
import json, os, sys

from gptoss_dist.distributed import agreement
from gptoss_dist.distributed.agreement import Fact, check_agreement
from gptoss_dist.distributed.processes import init_distributed, shut_down

ranks = init_distributed()
assert len(ranks.hosts) == ranks.world_size
gathers = []
gather = agreement.all_gather_objects
agreement.all_gather_objects = lambda value: gathers.append(1) or gather(value)
hosts, cases = json.load(open(sys.argv[1]))
for case in cases:
    code, settings, notes = case[ranks.rank]
    facts = [Fact("code", {"sources": code}, "copy it", {"revision": notes}), Fact("settings", settings, "give them")]
    try:
        said = check_agreement(facts, hosts) or f"agreed in 1 + {len(gathers)} exchanges"
    except ValueError as error:
        said = str(error)
    gathers.clear()
    print(json.dumps(said))
shut_down(0)
"""


@pytest.mark.distributed
def test_the_odd_one_out_is_named(tmp_path):
    same = ["a1", {"optim.lr": "0.001", "run.name": "x"}, "v1"]
    old = ["b2", same[1], "v0"]
    other = ["a1", {"optim.lr": "0.1", "run.name": "x", "new": "7"}, "v1"]
    third = ["a1", {"optim.lr": "0.5", "run.name": "x"}, "v1"]
    cases = {
        "all agree, but for a note": [same] * 4 + [["a1", same[1], "unknown"]],
        "old code": [same] * 4 + [old],
        "a tie, so rank 0 is right": [same, same, other, other, third],
        "rank 0 is the odd one": [old, same, same, same, same],
        "two things": [same, same, other, other, old],
    }
    (tmp_path / "cases").write_text(json.dumps([HOSTS, list(cases.values())]))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(str(tmp_path / "script.py"), str(tmp_path / "cases"), processes=5)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    of_ranks = [lines[5 * rank : 5 * rank + 5] for rank in range(5)]
    assert all(said == of_ranks[0] for said in of_ranks), of_ranks
    said = dict(zip(cases, of_ranks[0]))
    assert said["all agree, but for a note"] == "agreed in 1 + 0 exchanges"
    assert said["old code"] == (
        "node3 (rank 4) has other code than the other 4 ranks: revision is v0 instead of v1, sources is b2 instead "
        "of a1; copy it"
    )
    assert said["a tie, so rank 0 is right"] == (
        "node2 (ranks 2-3) has other settings than node1 (ranks 0-1): optim.lr is 0.1 instead of 0.001, new is 7 "
        "instead of missing; node3 (rank 4) yet others; give them"
    )
    assert said["rank 0 is the odd one"].startswith("node1 (rank 0) has other code than the other 4 ranks: ")
    assert said["two things"].count(" has other ") == 2


def test_one_process_agrees_with_itself():
    check_agreement([Fact("code", {"sources": "a"}, "copy it")], ["here"])


def test_the_digest_of_sources_is_of_names_and_contents(tmp_path, monkeypatch):
    package = tmp_path / "a_package" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "a_package" / "__init__.py").touch()
    (package / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    seen = [source_digest("a_package")]
    (package / "notes.txt").write_text("not code")
    assert source_digest("a_package") == seen[0] and source_digest("no_such_package_at_all") != seen[0]
    (package / "module.py").write_text("x = 2\n")
    seen.append(source_digest("a_package"))
    (package / "module.py").rename(package / "renamed.py")
    seen.append(source_digest("a_package"))
    assert len(set(seen)) == 3


TRAIN = """
import json, os, sys

rank = os.environ["RANK"]
os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"  # as if each process had a machine of its own

from gptoss_dist.distributed import hosts, processes
from gptoss_dist.train import changes
from launch.train import main

processes.this_host = lambda: f"node{rank}"
code, *argv = json.loads(sys.argv[1])[int(rank)]
if code:
    changes.source_digest = lambda *packages: code
sys.exit(processes.shut_down(main(argv)))
"""


@pytest.mark.distributed
def test_a_run_with_other_code_settings_or_data_somewhere_does_not_start(settings, corpus, tmp_path):
    """Each machine says so in one line, with exit code 2, before the folder of the run is there."""
    script, copy = tmp_path / "script.py", tmp_path / "copy"
    script.write_text(TRAIN)
    here = ["", "--config", str(settings)]
    code = ["other code than", "is 000000000000 instead of ", "optim.lr is 0.5 instead of 0.003; give"]
    data = ["other settings than", f"{copy} is not readable as data instead of missing"]
    cases = [
        (["0" * 12, *here[1:], "--optim.lr", "0.5"], code),
        (["", *here[1:], "--data.path", str(copy)], data),
    ]
    for second, words in cases:
        done = run(str(script), json.dumps([here, second]), processes=2, expect=2)
        said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert len(said) == 2 and said[0] == said[1], done.stderr
        assert "node1 (rank 1) has other" in said[0] and all(word in said[0] for word in words), said[0]
        assert "Traceback" not in done.stderr and not (tmp_path / "tiny").exists()
