"""The report of a run says what its records say, opens without a network, and runs nothing that the run has written."""

import json
import random
import re
import shutil
import subprocess
import time
from html import unescape

import numpy as np
import pytest
import yaml

from data_pipeline.ownership import owned
from gptoss_dist.config import load_config
from gptoss_dist.tracking.about.formats import amount, duration, si
from gptoss_dist.tracking.expert_tokens import ExpertTokens
from gptoss_dist.tracking.live.snapshot import RunWatch
from gptoss_dist.tracking.pages import run_page
from gptoss_dist.tracking.pages.origin import commands
from gptoss_dist.tracking.pages.overview import MOST_EVENTS, events_of
from gptoss_dist.tracking.pages.run_page import write_in_time, write_report
from gptoss_dist.tracking.pages.step_time import step_parts
from gptoss_dist.tracking.recorded.run import flat, read_run
from gptoss_dist.tracking.tracker import Tracker
from launch.report import main
from tests.support.recorded_runs import write_run

HOSTILE = '</script><script>document.title="owned"</script><b>&amp;\x1b[31m%{y}'
LAYERS, EXPERTS, STEPS = 2, 4, 40
FLOPS = "120000000.0"
"""Of a token."""
TAGS = {
    "git.sha": "0123456789ab-dirty",
    "world_size": "2",
    "hardware": HOSTILE,
    "host": "n1",
    "flops_per_token": FLOPS,
}
CONFIG = {
    "run": {"name": "night"},
    "model": {"num_hidden_layers": LAYERS, "hidden_size": 64, "vocab_size": 512, "num_local_experts": EXPERTS},
    "data": {"sources": [{"path": "data/web", "weight": 3.0}, {"path": "data/code", "weight": 1.0}], "seq_len": 128},
    "train": {"steps": STEPS, "micro_batch_size": 4},
    "optim": {"lr": 0.003},
    "sampling": {"prompts": [HOSTILE]},
}


def metrics(step):
    values = {
        "loss/train": 5.0 - 0.05 * step,
        "optim/lr": 0.003,
        "optim/grad_norm": 1.0 + step % 3,
        "optim/skipped_steps": float(step >= 17),
        "progress/tokens": 1000.0 * step,
        "perf/tokens_per_s": 500.0 if step not in (1, 21) else 1.0,
        "perf/mfu": 0.25,
        "perf/step_ms": 100.0,
        "perf/data_ms": 5.0,
        "perf/compute_ms": 80.0,
        "perf/optimizer_ms": 10.0,
        "perf/all_to_all_ms": 30.0,
        "perf/memory_rss_gib": 1.5,
        "data/web_share": 0.75,
        "data/web_epochs": 0.1 * step,
        "data/code_share": 0.25,
        "data/code_epochs": 0.01 * step,
    }
    return values | {f"moe/load_cv/layer_{layer}": 0.1 * (layer + 1) for layer in range(LAYERS)}


def train(folder):
    """Leave a run that is resumed at step 20, after 25, and skipped step 17; its evaluations and samples."""
    import torch

    folder.mkdir()
    for first, last, resumed in ((1, 25, None), (21, STEPS, 20)):
        experts = ExpertTokens(folder, 10, resumed)
        tracker = Tracker(
            folder,
            run_name="night",
            enabled=False,
            params=flat(CONFIG),
            tags=TAGS,
            dataset={"name": "web + code", "digest": "d" * 64, "source": "data/web, data/code"},
            resumed_step=resumed,
        )
        if resumed is not None:
            tracker.event(resumed, "resume", "resumed from a checkpoint")
        for step in range(first, last + 1):
            tracker.log(step, metrics(step))
            experts.add(step, torch.tensor([[1, 2, 3, 4]] * LAYERS) * (1 + step % 2))
            if step % 10 == 0:
                tracker.log(step, {"loss/val": 5.1 - 0.05 * step + 0.9 * (step == STEPS), "loss/val_web": 4.0})
                (folder / "samples").mkdir(exist_ok=True)
                text = f"{HOSTILE} {step}\n\n----\n\nsecond {step}\n"
                (folder / f"samples/step_{step:08d}.txt").write_text(text)
        if resumed is not None:
            tracker.event(30, "data", f"the weights changed {HOSTILE}")
        experts.close()
        tracker.close("FINISHED")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    load_config(folder / "config.yaml").save(folder / "config.yaml")  # as a run does, with every setting
    result = {
        "evaluation": "passkey",
        "subject": {"name": "night", "source": "night", "step": 40},
        "metrics": {"eval/passkey/accuracy": 0.5},
        "rows": [{"length": 256, "accuracy": 0.53125, "note": HOSTILE}, {"length": 1024, "accuracy": None}],
    }
    path = folder / "evaluations/passkey-1/result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "night")


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder, message=pytest.fail).read_text()


def figures(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return {figure["layout"]["title"]["text"]: figure for figure in map(json.loads, found)}


def words(page):
    """The text of the page, without scripts."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", page))


def test_curves_hold_what_was_recorded_on_four_axes(folder, page):
    loss = next(figure for title, figure in figures(page).items() if title.startswith("loss"))
    line, validation, web = (t for t in loss["data"] if t.get("name", "").startswith(("training", "validation")))
    steps = np.arange(1, STEPS + 1)
    assert line["customdata"] == steps.tolist()
    alpha, mean = 2 / (STEPS / 25 + 1), 4.95
    expected = [mean := mean + alpha * (metrics(step)["loss/train"] - mean) for step in steps]
    np.testing.assert_allclose(line["y"], expected, rtol=1e-5)
    assert set(line["meta"]) == {"tokens", "steps", "flops", "hours"}
    assert line["x"] == line["meta"]["tokens"] == (1000.0 * steps).tolist()
    run = read_run(folder)
    np.testing.assert_allclose(line["meta"]["flops"], 1e6 * run.exaflops, rtol=1e-4)  # teraFLOPs
    assert validation["customdata"] == [10, 20, 30, 40] and validation["y"] == [4.6, 4.1, 3.6, 4.0]
    assert web["name"] == "validation, web" and web["y"] == [4.0] * 4
    for trace in (trace for figure in figures(page).values() for trace in figure["data"] if "meta" in trace):
        assert {len(places) for places in trace["meta"].values()} == {len(trace["y"])}


def test_what_happened_is_in_the_table_and_in_the_curves(folder, page):
    run = read_run(folder)
    assert [(e.kind, e.step) for e in events_of(run) if e.kind != "start"] == [
        ("skipped", 17),
        ("resume", 20),
        ("data", 30),
    ]
    loss = next(figure for title, figure in figures(page).items() if title.startswith("loss"))
    (marks,) = (trace for trace in loss["data"] if trace.get("name") == "events")
    assert marks["meta"]["steps"] == [17, 17, None, 20, 20, None, 30, 30, None]
    assert marks["x"] == [17_000, 17_000, None, 20_000, 20_000, None, 30_000, 30_000, None]
    text = words(page)
    assert "1 resume, no rewind, 1 skipped step" in text and "the weights changed" in text
    assert len(re.findall(r"\bskipped\b", words(page))) >= 2


def test_summary_time_data_and_experts_are_computed_from_the_records(folder, page):
    text = " ".join(words(page).split())
    last = np.mean([metrics(step)["loss/train"] for step in range(1, STEPS + 1)])
    assert f"{last:.4f} training loss, mean of the last 40 steps" in text
    assert "3.6000 best validation loss, step 30" in text and "4.0000 last validation loss, step 40" in text
    assert "40k tokens" in text and "25.0 % MFU (model FLOPs), median" in text and "40 of 40" in text
    assert "web data/web 3 75.00 % 30k 4" in text and "code data/code 1 25.00 % 10k 0.4" in text
    rows, parts = step_parts(read_run(folder))
    assert len(rows) == STEPS - 2, "the first step of each process warms up"
    assert {name: values.mean() for name, values in parts.items()} == {
        "waiting for data": 5.0,
        "forward and backward": 50.0,
        "all-to-all": 30.0,
        "optimizer": 10.0,
        "rest": 5.0,
    }
    assert "all-to-all 30.0 30.0 %" in text
    drawn = figures(page)
    shares = drawn["load of each expert over time"]["data"]
    assert len(shares) == LAYERS and [trace["visible"] for trace in shares] == [True, False]
    np.testing.assert_allclose(shares[0]["z"], np.outer([0.4, 0.8, 1.2, 1.6], np.ones(4)))
    assert shares[0]["x"] == [0.5, 10.5, 20.5, 30.5, 40.5]
    (imbalance,) = drawn["imbalance of each layer"]["data"]
    np.testing.assert_allclose(imbalance["z"], np.outer([0.1, 0.2], np.ones(STEPS)), rtol=1e-3)
    assert "passkey, step 40" in text and "0.5312" in text


def test_settings_are_compared_with_the_defaults_and_the_commands_are_whole(page):
    text = " ".join(words(page).split())
    assert "optim.lr 0.003 0.0004" in text and "train.micro_batch_size 4 8" in text
    assert "train.gradient_accumulation" not in text, "it is the default"
    assert "git checkout 0123456789ab" in text and "changes that are not in this commit" in text
    assert "torchrun --standalone --nproc_per_node 2 launch/train.py --config" in text
    assert "d" * 64 in text


def test_no_text_of_the_run_is_more_than_text(page):
    assert HOSTILE not in page and "\x1b" not in page
    body = page.partition("<body>")[2]
    scripts = len(re.findall("<script", body))
    assert scripts == len(figures(page)) + 3, "figures, the switch, plotly.js and what draws them"
    assert words(page).count('</script><script>document.title="owned"</script><b>&amp;\\x1b[31m%{y} 40') == 1
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.split("plotly.js v")[0])


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_the_curves_without_a_network_and_the_switch_moves_them(page, tmp_path):
    choose = "var s = document.getElementById('axis'); s.value = 'steps'; s.dispatchEvent(new Event('change'));"
    errors = "addEventListener('error', function (e) { document.title = 'broken: ' + e.message; });"
    page = page.replace("<body>", f"<body><script>{errors}</script>", 1)
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{choose}</script></body>"))
    browser = "chromium --headless=new --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom"
    done = subprocess.run(
        [*browser.split(), f"--user-data-dir={tmp_path / 'profile'}", "--proxy-server=127.0.0.1:9", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout
    assert "<title>Run night</title>" in dom, done.stderr[-2000:]
    places = re.findall(r'<div class="figure[^"]*"', dom)
    assert len(places) == len(figures(page)) == dom.count('class="plot-container')
    titles = re.findall(r'class="xtitle"[^>]*>([^<]*)<', dom)
    assert titles and set(titles) == {"steps"}


def test_a_run_that_is_under_way_damaged_or_of_an_earlier_version(tmp_path, folder):
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    with open(torn / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 41, "time": 1, "metr\xff\n[1]\n{"step": 41, "time": ')
    with open(torn / "expert_tokens.jsonl", "ab") as file:
        file.write(b"{}\n")
    (torn / "evaluations/passkey-1/result.json").write_text("{")
    (torn / "config.yaml").write_text("a: [")
    (torn / "samples/step_00000050.txt").mkdir()
    (torn / "samples/step_00000060.txt").symlink_to("nothing")
    said = []
    text = " ".join(words(write_report(torn, message=said.append).read_text()).split())
    assert "metrics up to step 40" in text and len(said) == 6, said
    assert "config.yaml" in "".join(said) and "result.json" in "".join(said)

    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(folder / "metrics.jsonl", old)
    text = " ".join(words(write_report(old).read_text()).split())
    assert "1 resume, no rewind, 1 skipped step" in text and "skipped" in text.partition("Events")[2]

    with owned(torn):
        (torn / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        assert "running" in write_report(torn, tmp_path / "now.html", message=said.append).read_text()
    assert not list(tmp_path.rglob(".*.html.*"))


def test_mistakes_are_one_line(tmp_path, folder, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/config.yaml").write_text("")
    for arguments, expected in (
        ([str(tmp_path / "nothing")], "there is no such folder"),
        ([str(empty)], "holds no run"),
        ([str(tmp_path / "fresh")], "metrics.jsonl does not exist"),
        ([str(folder), "--output", str(empty)], "is a folder; name a file with --output"),
        ([str(folder), "--output", "/proc/nothing/report.html"], "cannot be written"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and said.startswith("report.py: "), said
    assert main([str(folder), "--output", str(tmp_path / "new/page.html")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "new/page.html")]


def test_the_end_of_a_run_neither_waits_nor_fails_for_its_report(tmp_path, folder, monkeypatch):
    said = []
    assert write_in_time(tmp_path, "failed", said.append) is None and not said, "there is nothing to report"
    monkeypatch.setattr(run_page, "page_of", lambda *args: 1 / 0)
    assert write_in_time(folder, "finished", said.append) is None
    assert "no report was written: ZeroDivisionError" in said.pop()
    monkeypatch.setattr(run_page, "page_of", lambda *args: time.sleep(2))
    began = time.monotonic()
    assert write_in_time(folder, "finished", said.append, timeout_s=0.1) is None and time.monotonic() - began < 1.5
    assert "launch/report.py" in said.pop()


def test_long_runs_are_thinned(tmp_path):
    steps = 20_000
    losses = write_run(tmp_path / "long", steps=steps, validate_every=0)
    page = write_report(tmp_path / "long").read_text()
    loss = next(figure for title, figure in figures(page).items() if title.startswith("loss"))
    low, high, _ = loss["data"]
    assert len(low["y"]) <= 700 and min(low["y"]) == pytest.approx(losses.min(), rel=1e-4)
    assert max(high["y"]) == pytest.approx(losses.max(), rel=1e-4)
    assert len(page) - len(re.search(r"<script>/\*\*?.*?</script>", page, re.DOTALL)[0]) < 2_000_000


def test_a_spike_does_not_flatten_the_curve_of_the_loss(tmp_path):
    losses = 2 + 3 * np.exp(-np.arange(300) / 60)
    losses[[200, 201]] = 400.0, 900.0
    write_run(tmp_path / "spike", steps=300, validate_every=0, losses=losses)
    run = read_run(tmp_path / "spike")
    loss = next(f for title, f in figures(write_report(tmp_path / "spike").read_text()).items() if title[:4] == "loss")
    low, high = loss["layout"]["yaxis"]["range"]
    assert low < 2.1 and 4 < high < 7
    (above,) = (trace for trace in loss["data"] if trace.get("name") == "training, above the chart")
    assert above["customdata"] == [201, 202] and above["text"] == ["up to 400", "up to 900"]
    assert above["meta"]["tokens"] == run.tokens[[200, 201]].tolist() and low < above["y"][0] < high


SHARES = [  # of 20 steps of 100 tokens: web and code, then web alone, then web and books
    *({"web_share": 0.5 + 0.25 * (step % 2), "code_share": 0.5 - 0.25 * (step % 2)} for step in range(1, 7)),
    *({} for _ in range(4)),
    *({"web_share": 0.2, "books_share": 0.8} for _ in range(10)),
]


def test_tokens_of_sources_add_up_over_changes_of_the_data(tmp_path):
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    for step, shares in enumerate(SHARES, 1):
        values = {f"data/{name}": value for name, value in shares.items()}
        tracker.log(step, {"progress/tokens": 100.0 * step, "loss/train": 1.0} | values)
    tracker.tag("data.change.1", "step 6: code is gone")
    tracker.tag("data.change.2", "step 10: books are new")
    page = write_report(tmp_path).read_text()
    text = " ".join(words(page).split())
    for expected in ("web – 25.00 % 500 ", "code – 15.00 % 300 ", "books – 40.00 % 800 ", "changed – 20.00 % 400 –"):
        assert expected in text, text.partition("weight")[2][:400]
    drawn = figures(page)["share of each source in all tokens so far (%)"]["data"]
    books, code, web = (trace["y"] for trace in drawn)
    assert [trace["name"] for trace in drawn] == ["books", "code", "web"] and drawn[0]["x"][-1] == 20
    assert books[5] == 0 and web[5] == 50 and web[0] == 75 and code[-1] == 18.75 and books[-1] == 50
    np.testing.assert_allclose(np.sum([books, code, web], axis=0), 100, rtol=1e-3)


def test_secrets_in_addresses_are_hidden_wherever_they_were_recorded(tmp_path):
    url = "https://ann:hunter2@host/data?token=hunter2"
    names = ("tag", "mlflow.source.git.repoURL", "data.change.1", "layout")
    tracker = Tracker(
        tmp_path,
        run_name="x",
        enabled=False,
        params={"data.path": url, "sampling.prompts": [url]},
        tags=dict.fromkeys(names, f"step 1: {url}"),
        dataset={"name": url, "source": url, "digest": "d" * 64},
    )
    tracker.log(1, metrics(1))
    tracker.event(1, "data", url)
    page = write_report(tmp_path).read_text()
    assert "hunter2" not in page and page.count("***@host") >= 7


def test_going_back_by_itself_is_no_resume(tmp_path):
    for events in (True, False):  # earlier versions recorded the count only
        folder = tmp_path / str(events)
        folder.mkdir()
        for number, resumed in enumerate((None, 4, 8)):
            tracker = Tracker(folder, run_name="x", enabled=False, resumed_step=resumed)
            if number == 2 and events:
                tracker.event(8, "resume", "resumed")
            tracker.log((resumed or 0) + 1, {"loss/train": 1.0})
            tracker.log(10, {"loss/train": 1.0} | ({"faults/rewinds": 1.0} if number else {}))
            if number == 0 and events:
                tracker.event(9, "rewind", "the loss rose")
            tracker.close("KILLED")
        assert "1 resume, 1 rewind," in words(write_report(folder).read_text())


def test_parts_of_a_step_never_take_longer_than_the_step(tmp_path):
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    for step in range(1, 11):
        values = {"step": 100.0, "data": 30.0, "compute": 80.0, "optimizer": 15.0 * (step % 2)}
        tracker.log(step, {f"perf/{name}_ms": value for name, value in values.items()})
    rows, parts = step_parts(read_run(tmp_path))
    np.testing.assert_allclose(sum(parts.values()), 100.0)
    assert len(rows) == 9 and parts["waiting for data"][:2] == pytest.approx([100 * 30 / 110, 100 * 30 / 125])
    assert "step 100.0 100.0 % 100.0 100.0 %" in " ".join(words(write_report(tmp_path).read_text()).split())


@pytest.mark.parametrize(
    "processes, machines, expected",
    [
        ("16", "2", "torchrun --nnodes 2 ... --nproc_per_node 8 launch/train.py"),
        ("2; echo owned", "1", "\npython launch/train.py"),
        ("\u0664", "\u00b2", "\npython launch/train.py"),
        ("2", "$(id)", "torchrun --standalone --nproc_per_node 2 launch/train.py"),
        ("0", "0", "\npython launch/train.py"),
    ],
)
def test_no_tag_gets_into_a_command(tmp_path, processes, machines, expected):
    tags = {"world_size": processes, "machines": machines, "git.sha": "$(id)"}
    Tracker(tmp_path, run_name="x", enabled=False, tags=tags).log(1, {"loss/train": 1.0})
    lines = commands(read_run(tmp_path))
    assert lines.endswith("-again --run.dir null --checkpoint.dir null")
    assert expected in lines and "owned" not in lines and lines.count("$(id)") == lines.count("'$(id)'") == 1


def test_many_events_are_cut_and_counted(tmp_path):
    folder = tmp_path / "busy"
    write_run(folder, steps=10)
    event = {"op": "event", "time": 1001.0, "step": 3, "kind": "skipped", "text": "step 3 skipped"}
    with open(folder / "tracking/journal.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for _ in range(MOST_EVENTS + 7))
    assert "8 earlier events left out" in write_report(folder).read_text()
    with open(folder / "tracking/journal.jsonl", "a") as file:
        file.writelines(json.dumps(event | {"kind": "checkpoint"}) + "\n" for _ in range(3))
    assert "3 checkpoints and 8 earlier events left out" in write_report(folder).read_text()
    text = (folder / "tracking/journal.jsonl").read_text().replace('"kind": "skipped"', '"kind": "checkpoint"', 50)
    (folder / "tracking/journal.jsonl").write_text(text)
    text = write_report(folder).read_text()
    assert "11 checkpoints left out" in text and text.count("<td>checkpoint</td>") == 42


@pytest.mark.parametrize(
    "value, expected",
    [(0, "0 "), (999.6, "1 k"), (131072, "131 k"), (4.2e15, "4.2 P"), (1.25e22, "12.5 Z"), (3e28, "3e+04 Y")],
)
def test_numbers_with_a_prefix(value, expected):
    assert si(value) == expected


@pytest.mark.parametrize(
    "value, expected", [(0, "0"), (512, "512"), (131072, "131k"), (999_999, "1M"), (2.09e10, "20.9B"), (3e12, "3T")]
)
def test_numbers_of_things(value, expected):
    assert amount(value) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [(0.33, "0.33 s"), (42, "42 s"), (300, "5 min"), (12_000, "3 h 20 min"), (400_000, "4 d 15 h")],
)
def test_lengths_of_time(seconds, expected):
    assert duration(seconds) == expected


NUMBERS = [0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), 3.0]
SETTINGS = ["x", None, 7, [], [1], {}, [{"path": 3, "weight": "much"}], True, -1, 1e400, HOSTILE]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_was_recorded_there_is_a_page(tmp_path, seed):
    draw = random.Random(seed)
    known = [*metrics(1), "data/<a href=x>_share", "loss/val", "loss/val_<b>", "eval/a/b", "faults/rewinds"]
    names = [name for name in known if draw.random() < 0.6]
    tracker = Tracker(tmp_path, run_name=HOSTILE, enabled=False, tags={"world_size": draw.choice(["2", "many"])})
    for _ in range(draw.choice([1, 2, 30])):
        tracker.log(draw.randrange(40), {name: draw.choice(NUMBERS) for name in names if draw.random() < 0.9})
        if draw.random() < 0.1:
            tracker.event(draw.randrange(60), "rewind", HOSTILE)
            with open(tmp_path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"event": "resume", "step": draw.randrange(60), "time": 1.0}) + "\n")
    tracker.tag("spike.1", HOSTILE)
    tracker.log(draw.randrange(40), {"optim/lr": 1.0})
    sections = {part: {key: draw.choice(SETTINGS) for key in values} for part, values in CONFIG.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections if draw.random() < 0.8 else draw.choice(SETTINGS)))
    rows = [[[draw.randrange(2**40) for _ in range(draw.choice([2, 3]))]] for _ in range(5)]
    lines = [{"first_step": draw.randrange(9), "step": draw.randrange(9), "tokens": tokens} for tokens in rows]
    (tmp_path / "expert_tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path, message=lambda text: None).read_text()
    assert HOSTILE not in page and len(figures(page)) > 0
    names = [trace.get("name", "") for figure in figures(page).values() for trace in figure["data"]]
    assert not [name for name in names if "<" in name], "plotly.js obeys some tags in names"
    RunWatch(tmp_path).look()


def test_a_run_that_has_validated_only(tmp_path):
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    tracker.log(0, {"loss/val": 9.0})
    assert "9.0000 best validation loss, step 0" in " ".join(words(write_report(tmp_path).read_text()).split())
