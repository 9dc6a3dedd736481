"""The note of a run: what it says, and that it stays short."""

import dataclasses
import time
from pathlib import Path

import pytest

from gptoss_dist.planner.parameters import ParameterCount
from gptoss_dist.tracking.about.facts import RunFacts, data_text
from gptoss_dist.tracking.about.formats import amount
from gptoss_dist.tracking.about.note import MOST_CHARACTERS, MOST_EVENTS, Standing, render
from gptoss_dist.tracking.records import Event

FACTS = RunFacts(
    name="quick",
    folder=Path("runs/quick run"),
    model="4 layers x 256, 8 experts, top 2",
    parameters=ParameterCount(9_700_000, 6_000_000, 3_100_000),
    data=(("web", 0.7), ("code", 0.3)),
    engine="fsdp",
    layout="fsdp replicate 1 x shard 2",
    precision="fp32",
    hardware="CPU x 2 cores",
    processes=2,
    machines=1,
    steps=200,
    tokens_per_step=2048,
    flops_per_token=2e7,
    peak="unknown",
    revision="abc123",
    changed={"optim.lr": "0.002", "train.steps": "200"},
)
NOW = Standing(
    state="running",
    time=1.7e9,
    step=150,
    tokens=307_200,
    exaflops=6.144e-6,
    hours=0.5,
    gpu_hours=1.0,
    train_loss=4.25,
    averaged_steps=20,
    best=(4.125, 100),
    last=(4.5, 150),
    tokens_per_s=1234.5,
    mfu=0.125,
    skipped_steps=1,
)


def rows(note):
    cells = [line.strip("|").split("|") for line in note.splitlines() if line.startswith("| ")]
    return {name.strip(): value.strip() for name, value in cells if name.strip()}


def test_it_says_what_the_run_is_and_how_it_stands():
    events = [
        Event(1.7e9, 0, "start", "training begins"),
        Event(1.7e9, 100, "checkpoint", "step_00000100"),
        Event(1.7e9, 137, "skipped", "loss nan |\n gradient norm inf"),
    ]
    note = render(FACTS, NOW, events)
    first, _, state, losses, costs, happened = note.splitlines()[:6]
    assert "9.7M parameters, 3.1M active" in first and "web 70 %, code 30 %" in first
    assert state.startswith("- **running**, step 150 of 200 (75 %), as of ")
    best = "validation loss best **4.1250** at step 100, last 4.5000 at step 150"
    assert losses == f"- {best}; training 4.2500 (mean of 20 steps)"
    costs_before, speed = costs.split("; ")
    assert costs_before == "- 307,200 tokens, 6.144e-06 exaFLOPs, 1.00 device-hours"
    assert speed == "of late 1,234 tokens/s, MFU 12.5 %"
    assert happened == "- 1 skipped: step 137"
    table = rows(note)
    assert table["tokens a step"] == "2,048" and table["hours"] == "0.50, of 1.00 device-hours"
    assert table["MFU counts"].startswith("model FLOPs: ")
    assert table["checkpoint"] == "step_00000100"
    assert table["devices"] == "2 processes on 1 machine, CPU x 2 cores"
    told = [line for line in note.splitlines() if line.startswith("- step")]
    assert len(told) == 2 and told[0].startswith("- step 0, ")
    assert told[1].startswith("- step 137, ") and told[1].endswith("**skipped** loss nan \\| gradient norm inf")
    assert "`optim.lr=0.002`, `train.steps=200`" in note
    launch = "torchrun --standalone --nproc_per_node 2 launch/train.py \\\n    --config 'runs/quick run/config.yaml'"
    assert f"\n{launch} --resume auto\n" in note
    assert f"\n{launch} --run.name=quick-again --run.dir null \\\n    --checkpoint.dir null\n" in note
    assert max(map(len, note.partition("```")[2].splitlines())) < 93, "MLflow's page gets as wide as the longest"


def test_it_says_what_is_not_known_yet():
    now = Standing(state="running", time=0.0, step=0, tokens=0, exaflops=0.0, hours=0.0, gpu_hours=0.0)
    note = render(dataclasses.replace(FACTS, processes=1, changed={}), now, [])
    assert note.splitlines()[2:5] == [
        f"- **running**, step 0 of 200 (0 %), as of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(0))}",
        "- validation loss: none yet",
        "- 0 tokens, 0 exaFLOPs, 0.00 device-hours",
    ]
    assert rows(note)["checkpoint"] == "none yet"


def test_what_bends_a_curve_is_told_first():
    events = [Event(1.7e9, step, "skipped", "") for step in range(1, 9)]
    events += [Event(1.7e9, 1_100, "resume", ""), Event(1.7e9, 40, "rewind", ""), Event(1.7e9, 50, "data", "")]
    now = dataclasses.replace(NOW, last=(4.125, 100), skipped_steps=8)
    lines = render(FACTS, now, events).splitlines()
    assert lines[3].startswith("- validation loss best **4.1250** at step 100; training")
    assert lines[5] == (
        "- resumed after step 1,100; went back at step 40; data changed at step 50; "
        "8 skipped: step 4, 5, 6, 7, 8 and 3 more"
    )


@pytest.mark.parametrize("length", [5, 230, 5000])
def test_old_events_are_left_out_before_it_grows_too_long(length):
    events = [Event(1.7e9, step, "rewind", f"{step}:" + "x" * length) for step in range(1, 60)]
    changed = {f"section.key{i}": "v" * length for i in range(40)}
    note = render(dataclasses.replace(FACTS, changed=changed), NOW, events)
    assert len(note) <= MOST_CHARACTERS
    shown = [line for line in note.splitlines() if line.startswith("- step")]
    assert 0 < len(shown) <= MOST_EVENTS and shown[-1].startswith("- step 59,")
    assert f"(the last {len(shown)} of 59)" in note
    assert note.count("```") == 2, "the commands are whole"


def test_a_mixture_of_many_sources_leaves_room_for_the_rest():
    data = tuple((f"https-example-org-corpus-number-{i}", 1 / 300) for i in range(300))
    note = render(dataclasses.replace(FACTS, data=data), NOW, [Event(1.7e9, 3, "data", "changed")])
    assert note.count("corpus-number-0 0.333 %") == 1 and " and 294 more\n" in note
    assert "**data** changed" in note and note.count("```") == 2 and len(note) < 2000


def test_numbers_and_sources_in_words():
    assert [amount(n) for n in (950, 4_200, 9_712_345, 20_914_757_184)] == ["950", "4.2k", "9.71M", "20.9B"]
    assert data_text((("pystdlib", None),)) == "pystdlib"
    assert data_text((("a", 0.5), ("b", 0.5)), most=1) == "a 50 % and 1 more"
