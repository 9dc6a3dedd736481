"""Where the results of an evaluation go: to the run that a checkpoint lies in, into a folder that nobody else gets."""

import json
import threading
from pathlib import Path

import pytest

from gptoss_dist.evaluation import results
from gptoss_dist.evaluation.options import ResultOptions
from gptoss_dist.evaluation.results import Result, Subject, publish, results_folder, subject_of


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs/named"
    (folder / "checkpoints/step_00000800").mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    return folder


def test_a_checkpoint_belongs_to_its_run_however_it_is_named(run, tmp_path, monkeypatch):
    checkpoint = run / "checkpoints/step_00000800"
    (tmp_path / "best").symlink_to(checkpoint)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/metrics.jsonl").touch()  # another run, in which somebody has put a link
    (tmp_path / "elsewhere/best").symlink_to(checkpoint)
    (tmp_path / "linked").symlink_to(run)
    ways = [
        (run / "checkpoints", "step_00000800", run),
        (checkpoint, ".", run),
        (checkpoint, "../..", Path("../..")),
        (tmp_path, "best", run),
        (tmp_path / "elsewhere", "best", run),
        (tmp_path, "runs/named/checkpoints/step_00000800", Path("runs/named")),
        (tmp_path, "linked/checkpoints/step_00000800", Path("linked")),  # as its records know it, perhaps
    ]
    for folder, name, expected in ways:
        monkeypatch.chdir(folder)
        subject = subject_of(name, Path(name), 800)
        assert (subject.run, subject.name) == (expected, "named"), name
        with results_folder(ResultOptions(), "passkey", subject) as made:
            assert made.resolve().parent == run / "evaluations"


def test_checkpoints_on_another_disk_and_models_without_a_run(run, tmp_path, monkeypatch):
    (run / "checkpoints").rename(tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    assert subject_of("x", run / "checkpoints/step_00000800").run == run
    monkeypatch.chdir(tmp_path)
    subject = subject_of("large/step_00000800")
    assert (subject.run, subject.name) == (None, "step_00000800")
    with results_folder(ResultOptions(), "passkey", subject) as made:
        assert made.parent == Path("evaluations") and made.is_dir()


def test_evaluations_that_begin_together_get_folders_of_their_own(run, monkeypatch):
    subject = Subject("named", "named", 800, run)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    both_have_looked, look = threading.Barrier(2), results.dated_folder

    def look_together(parent, name):
        found = look(parent, name)
        if found.name.endswith("-000000"):
            both_have_looked.wait(20)
        return found

    monkeypatch.setattr(results, "dated_folder", look_together)

    def evaluate(number):
        with results_folder(ResultOptions(), "kv-cache", subject) as folder:
            publish(Result("kv-cache", {"number": number}, []), subject, folder, mlflow=False)

    threads = [threading.Thread(target=evaluate, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted((run / "evaluations").glob("*/result.json"))
    assert [file.parent.name for file in files] == [f"kv-cache-20260101-000000{end}" for end in ("", "-2")]
    assert sorted(json.loads(file.read_text())["settings"]["number"] for file in files) == [0, 1]


def test_a_folder_is_taken_from_the_beginning_and_left_if_the_evaluation_fails(tmp_path):
    subject, options = Subject("tiny", "tiny"), ResultOptions(output=str(tmp_path / "deep/out"))
    with pytest.raises(KeyboardInterrupt), results_folder(options, "passkey", subject) as folder:
        with pytest.raises(ValueError, match="out exists already; name a new folder"):
            results_folder(options, "passkey", subject).__enter__()
        raise KeyboardInterrupt
    assert not folder.exists()
    with pytest.raises(RuntimeError), results_folder(options, "passkey", subject) as folder:
        (folder / "samples.jsonl").touch()
        raise RuntimeError("after something was written")
    assert (folder / "samples.jsonl").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"results cannot be written to .*file/out; name another place"):
        results_folder(ResultOptions(output=str(tmp_path / "file/out")), "passkey", subject).__enter__()
