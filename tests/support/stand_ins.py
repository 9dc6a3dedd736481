"""Small datasets and weights in the place of published ones: the same folders, files and columns, made-up content."""

import gzip
import json
import random
from importlib import resources
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

WORDS = ["the", "of", "model", "data", "token", "import", "return", "def", "alpha", "beta", "0", "1", "once", "upon"]
DOCUMENTS = 60


def texts(seed: int, characters: int = 300) -> list[str]:
    """Return documents that differ, each of at least so many characters."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=characters // 3)) + f" {seed} {n}." for n in range(DOCUMENTS)]


def fineweb(folder: Path, seed: int, *, scored: bool) -> None:
    """Write a dataset as HuggingFaceFW's: parquet below sample/10BT, which the card calls sample-10BT."""
    columns = {"text": texts(seed), "id": [f"<urn:uuid:{n}>" for n in range(DOCUMENTS)]}
    columns |= {"dump": ["CC-MAIN-2024-10"] * DOCUMENTS, "url": ["https://example.org"] * DOCUMENTS}
    columns |= {"language_score": [0.9] * DOCUMENTS, "token_count": [100] * DOCUMENTS}
    if scored:
        columns |= {"score": [3.1] * DOCUMENTS, "int_score": [3] * DOCUMENTS}
    _parquet(folder / "sample/10BT/000_00000.parquet", columns)
    card = "configs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")


def stack(folder: Path, seed: int) -> None:
    """Write Python files as bigcode/the-stack-dedup has them."""
    columns = {"hexsha": [f"{n:040x}" for n in range(DOCUMENTS)], "size": [300] * DOCUMENTS, "content": texts(seed)}
    columns |= {"lang": ["Python"] * DOCUMENTS, "max_stars_repo_licenses": [["mit"]] * DOCUMENTS}
    _parquet(folder / "data/python/data-00000-of-00144.parquet", columns)


def codeparrot(folder: Path, seed: int) -> None:
    """Write Python files as codeparrot/codeparrot-clean-train has them."""
    rows = [{"repo_name": "a/b", "path": "c.py", "content": text, "license": "mit"} for text in texts(seed)]
    folder.mkdir(parents=True)
    with gzip.open(folder / "file-000000000001.json.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def open_web_math(folder: Path, seed: int) -> None:
    """Write pages as open-web-math/open-web-math has them."""
    columns = {"url": ["https://example.org"] * DOCUMENTS, "text": texts(seed)}
    columns |= {"date": ["2023-10-10T01:02:03"] * DOCUMENTS, "metadata": ["{}"] * DOCUMENTS}
    _parquet(folder / "data/train-00000-of-00114.parquet", columns)


def proof_pile(folder: Path, seed: int) -> None:
    """Write papers as EleutherAI/proof-pile-2 has them."""
    path = folder / "arxiv/train/arXiv_000.jsonl.zst"
    path.parent.mkdir(parents=True)
    lines = [json.dumps({"text": text, "meta": {"yymm": "2001"}}) + "\n" for text in texts(seed, 1500)]
    path.write_bytes(zstandard.compress("".join(lines).encode()))


def tiny_stories(folder: Path, seed: int) -> None:
    """Write stories as roneneldan/TinyStories has them."""
    _parquet(folder / "data/train-00000-of-00004-2d5a1467fff1081b.parquet", {"text": texts(seed)})
    _parquet(folder / "data/validation-00000-of-00001-869c898b519ad725.parquet", {"text": texts(seed + 1)})


def rank_file(path: Path) -> None:
    """Write a rank file as LLaMA-3's tokenizer.model is one, of 1,000 ranks."""
    lines = (resources.files("data_pipeline.tokenizer") / "builtin.tiktoken").read_bytes().splitlines(keepends=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(lines[:1000]))


def openai_model(folder: Path, fields: dict) -> None:
    """Write a model as openai/gpt-oss-20b/original is one, in MXFP4."""
    import gptoss_dist
    from gptoss_dist.model.init import initialize

    model = gptoss_dist.GptOss(gptoss_dist.ModelConfig(**fields))
    initialize(model, seed=0)
    gptoss_dist.save_pretrained(model, folder, layout="openai", pack=True)


def _parquet(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
