"""Checkpoints and models that somebody crafted are refused in one line, before memory is taken or a file is read."""

import json
import os
import shutil
import threading
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptoss_dist
from gptoss_dist import checkpoint
from gptoss_dist.checkpoint.formats.export import export
from gptoss_dist.checkpoint.formats.inspect import describe
from gptoss_dist.checkpoint.formats.pretrained import open_pretrained
from gptoss_dist.checkpoint.info import INFO, CheckpointInfo, read_info, sealed
from gptoss_dist.checkpoint.store import misfits
from tests.support.crafted import WRONG, changed, is_one_line, keys, text

EARLIER = Path(__file__).parents[1] / "fixtures" / "step_00000003"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run with one checkpoint."""
    shutil.copytree(EARLIER, tmp_path / "run" / "checkpoints" / EARLIER.name)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the same model in both layouts, in several files."""
    folder = tmp_path_factory.mktemp("models")
    for layout in ("hf", "openai"):
        export(open_pretrained(EARLIER), folder / layout, layout, dtype=torch.float32, file_bytes=30_000)
        (folder / layout / "SHA256SUMS").unlink()  # else whatever is changed is refused for that
    return folder


def refusal(read, *names: str) -> str:
    """What a reader says, which must not wait for ever."""
    said: list[str] = []

    def call():
        try:
            said.append(f"accepted: {read()}")
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert said, "it waits"
    assert is_one_line(said[0], *names), said[0]
    return said[0]


def fits(folder: str) -> None:
    """Open a model as far as its values are not read."""
    opened = open_pretrained(folder, message=lambda line: None)
    with torch.device("meta"):
        model = gptoss_dist.GptOss(opened.config)
    weights = dict(chain(model.named_parameters(), model.named_buffers()))
    if wrong := misfits(weights, {name: tensor.shape for name, tensor in opened.tensors.items()}):
        raise ValueError(f"{folder}/config.json: {'; '.join(wrong)}"[:1000])


NO_MATTER = ("architectures", "dtype", "torch_dtype", "output_router_logits", "use_cache")
"""Keys of transformers' config.json that are not read here."""
OF_NO_TENSOR = {
    "sliding_window",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "swiglu_alpha",
    "swiglu_limit",
    "rope_theta",
    "rope_scaling_factor",
    "rope_ntk_alpha",
    "rope_ntk_beta",
}
"""Numbers of which any within their ranges may be a model's."""


@pytest.mark.parametrize("layout", ["hf", "openai"])
@pytest.mark.parametrize("kind", WRONG)
def test_every_value_of_a_model_configuration(models, tmp_path, layout, kind):
    folder = tmp_path / layout
    folder.mkdir()
    for path in (models / layout).iterdir():
        (folder / path.name).hardlink_to(path)
    values = json.loads((folder / "config.json").read_text())
    for path in keys(values):
        if path[0] in NO_MATTER or (kind in ("gone", "null") and layout == "hf"):
            continue  # what transformers leaves out has defaults
        if kind in ("huge", "large", "fraction", "negative", "flag") and {*path} & OF_NO_TENSOR:
            continue
        if changed(values, path, kind) == values or (kind == "large" and path[0].endswith("token_id")):
            continue
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(text(changed(values, path, kind)))
        said = refusal(lambda: fits(f"{layout}:{folder}"), "config.json")
        assert "accepted" not in said, (path, kind, said)


CRAFTED_INFO = {
    "nested": lambda v: "[" * 200_000,
    "not an object": lambda v: "7",
    "outside": lambda v: sealed(v | {"files": v["files"] | {"../../secret": {"bytes": 1, "sha256": "0" * 64}}}),
    "absolute": lambda v: sealed(v | {"files": v["files"] | {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}),
    "no files": lambda v: sealed({k: x for k, x in v.items() if k != "files"}),
    "files of text": lambda v: sealed(v | {"files": {"rank_00000.safetensors": "x"}}),
    "no step": lambda v: sealed({k: x for k, x in v.items() if k != "step"}),
    "step of text": lambda v: sealed(v | {"step": "three"}),
    "a list left out": lambda v: sealed(v | {"files": {n: e for n, e in v["files"].items() if "rng" not in n}}),
    "more ranks than files": lambda v: sealed(v | {"world_size": 10**12}),
    "twice": lambda v: sealed(v).replace('"step": 4', '"step": 4, "step": 4'),
}


@pytest.mark.parametrize("kind", CRAFTED_INFO)
def test_a_crafted_checkpoint_is_passed_over_like_a_damaged_one(run, kind):
    older = run / "checkpoints" / EARLIER.name
    newer = older.with_name("step_00000004")
    shutil.copytree(older, newer)
    values = read_info(newer) | {"step": 4}
    (newer / INFO).write_text(sealed(values))
    assert checkpoint.resolve(run) == newer
    (newer / INFO).write_text(CRAFTED_INFO[kind](values))
    said = []
    assert checkpoint.resolve(run, said.append) == older
    assert len(said) == 1 and is_one_line(said[0], newer.name)


@pytest.mark.parametrize("kind", [kind for kind in WRONG if kind not in ("null", "deep")])
def test_every_value_that_a_resume_reads(run, kind):
    folder = run / "checkpoints" / EARLIER.name
    values = read_info(folder)
    needed = (
        "step",
        "samples_consumed",
        "config",
        "data",
        "data.content_sha256",
        "data.mixture.sources",
        "data.mixture.start",
        "data.mixture.read",
        "data.mixture.history",
    )
    harmless = {
        "large": ("step", "samples_consumed", "data.mixture.start"),
        "text": ("data.content_sha256",),
        "object": ("config",),
    }
    for key in needed:
        if key not in harmless.get(kind, ()):
            (folder / INFO).write_text(sealed(changed(values, tuple(key.split(".")), kind)))
            assert "accepted" not in refusal(lambda: CheckpointInfo.read(folder), INFO), key


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "anything"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_no_link_leads_out_of_a_model_and_no_pipe_is_waited_for(models, tmp_path, name, kind):
    folder = tmp_path / "model"
    shutil.copytree(models / "hf", folder)
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    if kind == "link":
        (folder / name).symlink_to("../secret")
    else:
        os.mkfifo(folder / name)
    assert "accepted" not in refusal(lambda: open_pretrained(f"hf:{folder}"), name)


def test_the_links_of_the_hub_cache_are_followed(models, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(models / "hf", blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    fits(f"hf:{snapshot}")
    export(open_pretrained(f"hf:{snapshot}"), tmp_path / "out", "hf")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def with_header(path: Path, tensors: dict, places: dict | str) -> None:
    save_file(
        tensors, path, {"format": "pt", "DCP_SHARDING_INFO": places if isinstance(places, str) else json.dumps(places)}
    )


@pytest.mark.parametrize(
    "places, words",
    [
        ({"model.embed_tokens.weight": {"saved_offsets": [10**15, 0]}}, "values of model.embed_tokens.weight"),
        ({"model.embed_tokens.weight": {"saved_offsets": [-1, 0]}}, "saved_offsets"),
        ({"model.embed_tokens.weight": {"saved_offsets": [0]}}, "has no place for"),
        ({"other": {"saved_offsets": [0, 0]}}, "has no place for"),
        ({"model.embed_tokens.weight": {"saved_offsets": "x"}}, "saved_offsets"),
        ("[" * 100_000, "nested"),
        ("{", "is not readable JSON"),
    ],
)
def test_headers_are_compared_before_memory_is_taken(models, tmp_path, places, words):
    folder = tmp_path / "model"
    shutil.copytree(models / "hf", folder)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    name = "model.embed_tokens.weight"
    with_header(folder / "a.safetensors", {name: tensors.pop(name)}, places)
    save_file(tensors, folder / "b.safetensors")
    assert words in refusal(lambda: open_pretrained(f"hf:{folder}"), "a.safetensors", str(folder))


def test_inspect_names_tensors_that_are_not_finite(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "hf", folder)
    assert describe(folder).splitlines()[-2] == "all values are finite"
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    tensors["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), 1.0])
    save_file(tensors, path)
    assert "NOT FINITE: 2 values of model.norm.weight" in describe(folder)
    assert "FINITE" not in describe(folder, values=False) and "\x1b" not in describe(folder)
