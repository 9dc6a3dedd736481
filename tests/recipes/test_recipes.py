"""Every command of docs/recipes, one after the other in one folder, on stand-ins of what they read.

`RULES` says for each command what is done in its place: what runs it, what is exchanged, and what is appended to make
it small. A command that no rule fits fails the test, and so does a rule that no command needs. What stand-ins replace,
tokenizers and their sizes, is compared as the pages and recipes have it.
"""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline import Manifest
from data_pipeline.command_line import parse
from data_pipeline.prepare.settings import PrepareConfig
from gptoss_dist.config import parse_arguments
from gptoss_dist.tracking.tracker import read_metrics
from gptoss_dist.train.data import sources
from tests.support import hub, stand_ins
from tests.support.ranks import MODEL as TINY_MODEL
from tests.support.ranks import ROOT, environment, losses, run

pytestmark = pytest.mark.distributed

FENCED = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
VOCABULARY = 600
# With the number of positions that each recipe's own model has.
MODEL = {name: value for name, value in TINY_MODEL.items() if name != "max_position_embeddings"}
MODEL["vocab_size"] = VOCABULARY
SMALL_MODEL = " ".join(f"--model.{name} {value}" for name, value in MODEL.items()) + " --model.layer_types null"
SMALL_RUN = (
    f"{SMALL_MODEL} --data.seq_len 32 --train.steps 4 --train.micro_batch_size 2 --train.gradient_accumulation 1 "
    "--train.precision fp32 --train.compile false --optim.warmup_steps 1 --checkpoint.every 2 --validation.every 4 "
    "--validation.samples 4 --sampling.max_new_tokens 4 --tracking.plots false"
)
IDS = {"o200k_base": 200_019, "o200k_harmony": 201_088}
"""Of the vocabularies that are not fetched by a command of a page; docs/data/tokenizers.md."""
SMALL_DATA = f"--vocab-size {VOCABULARY} --validation-fraction 0.2 --workers 1"


@dataclass
class Folder:
    """Where the commands of one page are run."""

    path: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture
    printed: dict[str, list[str]] = field(default_factory=dict)
    """What commands printed, by the command as the page has it."""


def nothing(folder: Folder, words: list[str]) -> str:
    """Stand for a command that needs the network, or an environment of its own."""
    return ""


def module(folder: Folder, words: list[str]) -> str:
    """Run `python -m MODULE` in this process."""
    folder.monkeypatch.setattr(sys, "argv", words[2:])
    folder.capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    output = folder.capsys.readouterr()
    assert end.value.code in (0, None), output.err
    return output.out


def from_hub(folder: Folder, words: list[str]) -> str:
    """Run `python -m MODULE` in a process whose Hugging Face hub is a stub that serves `hub/`."""
    with hub.running(folder.path / "hub") as server:
        variables = environment(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HOME=str(folder.path / "home"))
        line = [sys.executable, *words[1:]]
        done = subprocess.run(line, cwd=folder.path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(folder: Folder, words: list[str]) -> str:
    """Run `python FILE`, or the same under torchrun in two processes."""
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    processes = 1 if words[0] == "python" else 2
    return run(words[at], *words[at + 1 :], processes=processes, cwd=folder.path).stdout


def user_interface(folder: Folder, words: list[str]) -> str:
    """Parse the command line of MLflow's pages, and look whether its database has runs."""
    from mlflow import MlflowClient
    from mlflow.cli import cli

    user_interface = cli.get_command(None, words[1])
    uri = user_interface.make_context("mlflow", words[2:]).params["backend_store_uri"]
    assert uri.startswith("sqlite:///mlflow.db")
    client = MlflowClient(f"sqlite:///{folder.path / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return " ".join(run.info.run_name for run in client.search_runs(experiments))


@dataclass(frozen=True)
class Rule:
    """What is done in the place of commands that have a text in them."""

    fits: str
    runs: Callable[[Folder, list[str]], str]
    appended: str = ""
    instead: tuple[tuple[str, str], ...] = ()
    """Texts of the command, each with another one."""


TOKENIZER = ("--tokenizer data/llama3/original/tokenizer.model --vocab-size 128000", "")
LLAMA3 = f"--tokenizer data/llama3/original/tokenizer.model --pattern llama3 {SMALL_DATA}"
RULES = [
    Rule("sh launch/install.sh", nothing),  # tests/launch/test_install.py
    Rule("hf auth login", nothing),
    Rule("hf download meta-llama/Llama-3.2-1B", nothing),  # the stand-in is there
    Rule("hf download openai/gpt-oss-20b", nothing),
    Rule("pretrain_502m/stack_python.yaml", from_hub, LLAMA3),
    Rule("pretrain_502m/arxiv.yaml", from_hub, LLAMA3),
    Rule("codeparrot-clean-train", module, f"{LLAMA3} --overwrite", (TOKENIZER,)),
    Rule("prepare --config configs/data/pretrain_502m/", module, LLAMA3),
    Rule("configs/data/tinystories.yaml", module, f"--tokenizer builtin {SMALL_DATA}"),
    Rule("configs/data/fineweb_edu_10bt.yaml", module, f"--tokenizer builtin {SMALL_DATA}"),
    Rule("prepare my-texts/", module, f"--tokenizer builtin {SMALL_DATA}"),
    Rule("python -m data_pipeline.verify", module),
    Rule("python -m data_pipeline.inspect", module),
    Rule("nproc_per_node 8 launch/train.py", script, f"{SMALL_RUN} --parallel.expert_parallel 2"),
    Rule("torchrun", script, f"{SMALL_RUN} --train.steps 8"),  # it goes on with what one process has done
    Rule("python launch/train.py", script, f"{SMALL_RUN} --tracking.mlflow false"),
    Rule("--gpus 8", script, f"{SMALL_RUN} --parallel.expert_parallel 4", (("--gpus 8", "--gpus 4"),)),
    Rule("python launch/plan.py", script, SMALL_RUN),
    Rule("python launch/watch.py", script, "--once"),
    Rule("python launch/compare.py", script, "--no-mlflow"),
    Rule("mlflow ui", user_interface),
    Rule("evaluate.py kv-cache", script, "--no-mlflow"),
    Rule("evaluate.py passkey", script, "--trials 1 --depths 1 --no-mlflow", (("4096 131072", "600"),)),
    Rule("evaluate.py perplexity", script, "--no-mlflow"),
    Rule("python launch/generate.py", script, "--max-new-tokens 4"),
    Rule("python launch/convert.py", script),
    Rule("python examples/load_in_transformers.py", script),
]


def commands(page: str) -> list[str]:
    """Return the command lines of a page, in order."""
    text = (ROOT / "docs/recipes" / page).read_text().replace("\\\n", " ")
    lines = [line.strip() for block in FENCED.findall(text) for line in block.splitlines()]
    return [" ".join(line.split()) for line in lines if line]


def rule_of(command: str) -> Rule:
    """Return the first rule that fits."""
    found = next((rule for rule in RULES if rule.fits in command), None)
    assert found is not None, f"no rule says how to run `{command}`"
    return found


def run_page(page: str, folder: Folder) -> None:
    """Run all commands of a page."""
    for command in commands(page):
        rule, line = rule_of(command), command
        for text, other in rule.instead:
            assert text in line, f"{text!r} is not in `{command}`"
            line = line.replace(text, other)
        folder.printed.setdefault(command, []).append(rule.runs(folder, shlex.split(f"{line} {rule.appended}")))


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys) -> Folder:
    for name in ("configs", "examples", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Folder(tmp_path, monkeypatch, capsys)


def difference_of_logits(printed: list[str]) -> float:
    return float(re.search(r"difference of the logits: (\S+)", printed[0])[1])


def printed_by(folder: Folder, part: str) -> list[str]:
    return next(printed for command, printed in folder.printed.items() if part in command)


def test_every_rule_is_needed():
    used = {rule_of(command).fits for page in (ROOT / "docs/recipes").glob("*.md") for command in commands(page.name)}
    assert used == {rule.fits for rule in RULES}


@pytest.mark.parametrize("page", [path.name for path in sorted((ROOT / "docs/recipes").glob("*.md"))])
def test_what_a_page_fetches_and_prepares_is_what_its_runs_read(page, monkeypatch):
    """Files are read where `hf download` leaves them, and a model has as many ids as the tokenizer of its data."""
    monkeypatch.chdir(ROOT)
    lines = [shlex.split(command) for command in commands(page)]
    fetched = set()
    for words in lines:
        if words[:2] == ["hf", "download"]:
            file = words[words.index("--include") + 1 if "--include" in words else 3]
            fetched.add(f"{words[words.index('--local-dir') + 1]}/{file}")
    vocabularies: dict[str, set[int]] = {}
    for words in lines:
        if "launch/train.py" in words:
            given = [words.index(name) for name in ("--config", "--model", "--data.path") if name in words]
            config, _ = parse_arguments([word for at in given for word in words[at : at + 2]])
            for source in sources(config.data):
                vocabularies.setdefault(source.path, set()).add(config.model.vocab_size)
            if start := config.init.get("from"):
                assert f"{start.removeprefix('openai:')}/*" in fetched
    prepared = [parse(PrepareConfig, words[3:], prog="prepare") for words in lines if "data_pipeline.prepare" in words]
    assert {settings.output for settings in prepared} == vocabularies.keys()
    for settings in prepared:
        assert settings.tokenizer in IDS or settings.tokenizer in fetched, settings
        ids = settings.vocab_size or IDS[settings.tokenizer]
        assert vocabularies[settings.output] == {ids}, settings


@pytest.mark.slow
def test_502m(folder):
    pytest.importorskip("transformers")
    stand_ins.rank_file(folder.path / "data/llama3/original/tokenizer.model")
    stand_ins.fineweb(folder.path / "HuggingFaceFW/fineweb-edu", 1, scored=True)
    stand_ins.fineweb(folder.path / "HuggingFaceFW/fineweb", 2, scored=False)
    stand_ins.stack(folder.path / "hub/bigcode/the-stack-dedup", 3)
    stand_ins.codeparrot(folder.path / "codeparrot/codeparrot-clean-train", 4)
    stand_ins.open_web_math(folder.path / "open-web-math/open-web-math", 5)
    stand_ins.proof_pile(folder.path / "hub/EleutherAI/proof-pile-2", 6)
    run_page("502m.md", folder)

    names = ("fineweb_edu", "fineweb", "stack_python", "open_web_math", "arxiv")
    before, after = printed_by(folder, "--dry-run")
    for name in names:
        assert f"--config configs/data/pretrain_502m/{name}.yaml`" in before
        assert Manifest.read(folder.path / "data/pretrain_502m" / name).tokenizer["n_vocab"] == VOCABULARY
    assert "NOT READY" not in after and "from step 1: fineweb_edu 50" in after
    assert sorted(losses(folder.path / "runs/pretrain_502m")) == list(range(1, 9))
    assert sorted(losses(folder.path / "runs/pretrain_500m_true")) == [1, 2, 3, 4]
    assert "step 8" in printed_by(folder, "launch/watch.py")[0]
    assert "pretrain_500m_true" in printed_by(folder, "launch/compare.py")[0]
    assert (folder.path / "runs/pretrain_502m/report.html").is_file()
    recorded = {key for row in read_metrics(folder.path / "runs/pretrain_502m") for key in row["metrics"]}
    assert {f"loss/val_{name}" for name in names} <= recorded
    assert "pretrain_502m" in printed_by(folder, "mlflow ui")[0]
    assert list((folder.path / "exports/pretrain_502m").glob("*.safetensors"))
    assert difference_of_logits(printed_by(folder, "load_in_transformers.py")) < 1e-4


def test_tinystories(folder):
    pytest.importorskip("transformers")
    stand_ins.tiny_stories(folder.path / "roneneldan/TinyStories", 1)
    run_page("tinystories.md", folder)
    assert sorted(losses(folder.path / "runs/tinystories_2b9")) == list(range(1, 9))
    assert difference_of_logits(printed_by(folder, "load_in_transformers.py")) < 1e-4


@pytest.mark.slow
def test_continue_20b(folder):
    stand_ins.openai_model(folder.path / "gpt-oss-20b/original", MODEL)
    stand_ins.fineweb(folder.path / "HuggingFaceFW/fineweb-edu", 1, scored=True)
    (folder.path / "my-texts").mkdir()
    for number, text in enumerate(stand_ins.texts(2)):
        (folder.path / f"my-texts/{number}.txt").write_text(text)
    run_page("continue_20b.md", folder)
    assert sorted(losses(folder.path / "runs/continue_20b")) == [1, 2, 3, 4]
    for name in ("continue_20b", "gpt-oss-20b", "continue_20b-openai"):
        assert (folder.path / "exports" / name / "config.json").is_file()
