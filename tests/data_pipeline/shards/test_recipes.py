"""Which recipe a missing dataset is made by, and that the recipes fit the runs that read what they make."""

from pathlib import Path

import pytest

from data_pipeline import Manifest
from data_pipeline.command_line import parse
from data_pipeline.prepare.settings import PrepareConfig
from data_pipeline.shards.recipes import find_recipe
from gptoss_dist.config import load_config

ROOT = Path(__file__).parents[3]
IDS = {"o200k_harmony": 201_088, "o200k_base": 200_019, "builtin": 4105}
"""Of vocabularies that recipes name; docs/data/tokenizers.md."""


def why_missing(directory: Path | str) -> str:
    with pytest.raises(ValueError) as refused:
        Manifest.read(directory)
    return str(refused.value)


def test_a_recipe_is_found_by_its_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs/data/mine"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("output: [\n")  # no YAML
    (folder / "b.yaml").write_text("- output\n")
    (folder / "c.yaml").write_text("output: 3\nsources: [x]\n")
    (folder / "d.yaml").write_text("output: data/./one/\nsources: [x]\n")
    (folder / "e.yaml").write_text("sources: [data/two]\n")
    for directory in ("data/one", tmp_path / "data/one", Path("data/../data/one")):
        assert find_recipe(Path(directory)) == Path("configs/data/mine/d.yaml")
    for directory in ("data/two", "one", "data"):
        assert find_recipe(Path(directory)) is None
    assert why_missing("data/one").endswith("`python -m data_pipeline.prepare --config configs/data/mine/d.yaml`")
    assert why_missing("data/two").endswith("`python -m data_pipeline.prepare SOURCES --output data/two`")
    (tmp_path / "data/one").mkdir(parents=True)
    assert "manifest.json cannot be read" in why_missing("data/one") and "mine/d.yaml`" in why_missing("data/one")
    # Of those beside the code, where the working directory has none for it.
    assert find_recipe(Path("data/tinystories")) == ROOT / "configs/data/tinystories.yaml"


@pytest.mark.heavy
def test_recipes_of_the_shipped_runs_fit_their_models(monkeypatch):
    """Each makes another folder, has a tokenizer that the model has room for, and is spelt as `prepare` reads it."""
    monkeypatch.chdir(ROOT)
    found = {}
    for run in sorted(ROOT.glob("configs/*.yaml")):
        config = load_config(run)
        for path in [source.path for source in config.data.sources] or [config.data.path]:
            if (recipe := find_recipe(Path(path))) is None:
                continue
            assert found.setdefault(path, recipe) == recipe
            settings = parse(PrepareConfig, ["--config", str(recipe)], prog="prepare")
            assert settings.output == path
            ids = settings.vocab_size or IDS.get(settings.tokenizer)
            if ids is not None:
                assert ids <= config.model.vocab_size, f"{recipe}: more ids than {run} has"
    outputs = [
        parse(PrepareConfig, ["--config", str(path)], prog="prepare").output
        for path in ROOT.glob("configs/data/**/*.yaml")
        if "output:" in path.read_text()
    ]
    assert len(set(outputs)) == len(outputs) and set(found) <= set(outputs)
    assert len([path for path in found if "pretrain_502m" in path]) == 5 and "data/tinystories" in found
