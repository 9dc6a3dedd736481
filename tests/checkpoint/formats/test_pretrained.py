"""Models come in from other tools and go out to them with the same logits."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptoss_dist
from data_pipeline import Tokenizer, disk, load_tokenizer
from data_pipeline.tokenizer.huggingface import huggingface_files
from data_pipeline.tokenizer.patterns import PATTERNS
from gptoss_dist.checkpoint.formats import huggingface
from gptoss_dist.checkpoint.formats.export import export
from gptoss_dist.checkpoint.formats.inspect import describe
from gptoss_dist.checkpoint.formats.pretrained import check_architecture, load_into, open_pretrained
from gptoss_dist.checkpoint.formats.tensor_files import INDEX
from gptoss_dist.ops.mxfp4 import Mxfp4, decode, encode

transformers = pytest.importorskip("transformers")

# Square down projections, so that only their contents tell which way round they are; an odd number of layers.
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "max_position_embeddings": 256,
}


def logits(model) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found).float()


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model that transformers has made and saved, in bf16 and several files, and its logits in float32."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, attn_implementation="eager")
    model = transformers.GptOssForCausalLM(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)  # biases too, and large enough for their places to matter
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder, max_shard_size="200KB")
    assert (folder / INDEX).is_file()
    return folder, logits(load_transformers(folder))  # anew: casting a model to bf16 rounds its rotary tables too


def load_transformers(folder, **options):
    model, report = transformers.GptOssForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def test_bf16_from_transformers(published, tmp_path):
    folder, expected = published
    model = gptoss_dist.load_pretrained(folder)
    assert near(logits(model), expected)
    assert near(logits(gptoss_dist.load_pretrained(f"hf:{folder}")), expected)
    gptoss_dist.save_pretrained(model, tmp_path / "again", dtype=torch.float32)
    assert near(logits(load_transformers(tmp_path / "again")), expected)
    assert model.config.sliding_window == 16 and model.config.rope_scaling.factor == 32.0


@pytest.mark.parametrize("tie", [False, True])
def test_export_to_transformers(published, tmp_path, tie):
    folder, expected = published
    if tie:
        folder = tmp_path / "tied"
        config = transformers.GptOssConfig(**SIZES, tie_word_embeddings=True)
        transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
        expected = logits(load_transformers(folder))
    export(open_pretrained(f"hf:{folder}"), tmp_path / "new", "hf", file_bytes=300_000)
    assert near(logits(load_transformers(tmp_path / "new")), expected)
    assert near(logits(gptoss_dist.load_pretrained(tmp_path / "new")), expected)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("pack", [False, True])
def test_openai_and_back(published, tmp_path, pack):
    """The names and shapes of REFERENCE: OpenAI's dense experts are [E, out, in]."""
    folder, expected = published
    source = open_pretrained(f"hf:{folder}")
    losses = export(source, tmp_path / "original", "openai", pack=pack)
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    assert tensors["block.1.attn.qkv.weight"].shape == (4 * 16 + 2 * 2 * 16, 64)
    gate_up = source.tensors["model.layers.2.mlp.experts.gate_up_proj"]
    whole = gate_up.read(tuple(slice(0, n) for n in gate_up.shape))
    if pack:
        assert tensors["block.2.mlp.mlp1_weight.blocks"].shape == (6, 128, 2, 16) and len(losses) == 6
        assert all(0.05 < loss < 0.2 for loss in losses.values())
    else:
        assert torch.equal(tensors["block.2.mlp.mlp1_weight"], whole.transpose(1, 2))
    back = gptoss_dist.load_pretrained(f"openai:{tmp_path / 'original'}")
    assert back.config.to_dict() == source.config.to_dict() | {"max_position_embeddings": 4096 * 32}
    if not pack:
        assert near(logits(back), expected)
    export(open_pretrained(f"openai:{tmp_path / 'original'}"), tmp_path / "hf", "hf")
    again = load_transformers(tmp_path / "hf")
    assert near(logits(again), logits(back))


def test_mxfp4_goes_out_and_comes_in(published, tmp_path):
    folder, _ = published
    export(open_pretrained(f"hf:{folder}"), tmp_path / "packed", "hf", pack=True, file_bytes=100_000)
    ours = gptoss_dist.load_pretrained(tmp_path / "packed")
    unpacked = load_transformers(tmp_path / "packed", quantization_config=transformers.Mxfp4Config(dequantize=True))
    assert near(logits(ours), logits(unpacked))
    # What was written, bit for bit, by way of the whole tensor.
    source = open_pretrained(f"hf:{folder}").tensors["model.layers.0.mlp.experts.down_proj"]
    whole = source.read(tuple(slice(0, n) for n in source.shape))
    values = decode(encode(whole.transpose(1, 2))).transpose(1, 2)
    assert torch.equal(ours.model.layers[0].mlp.experts.down_proj, values)
    # Packed again, nothing changes.
    export(open_pretrained(f"hf:{tmp_path / 'packed'}"), tmp_path / "again", "hf", pack=True)
    twice = gptoss_dist.load_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(t, twice[name]) for name, t in ours.state_dict().items())


def test_plain_numbers_named_blocks(published, tmp_path, caplog):
    """What transformers writes when it has unpacked a model (REFERENCE 2)."""
    folder, expected = published
    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            tensors[name + "_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert near(logits(gptoss_dist.load_pretrained(tmp_path)), expected)
    assert "hold plain numbers" in caplog.text


def test_any_part_of_a_packed_tensor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 131, (3, 10, 4), dtype=torch.uint8, generator=generator)
    save_file({"model.x_blocks": blocks, "model.x_scales": scales}, tmp_path / "model.safetensors")
    source = huggingface.read_tensors(tmp_path, print)["model.x"]
    whole = decode(Mxfp4(blocks, scales)).transpose(1, 2)
    assert source.shape == (3, 128, 10)
    for box in ((0, 3, 0, 128, 0, 10), (1, 2, 5, 6, 3, 4), (0, 3, 31, 97, 2, 9), (2, 3, 64, 96, 0, 1)):
        part = tuple(slice(*pair) for pair in zip(box[::2], box[1::2]))
        assert torch.equal(source.read(part).float(), whole[part])
    for limit in (1, 100, 2000, 1 << 20):
        seen = torch.zeros_like(whole)
        for box, values in source.parts(limit=limit):
            seen[box] += values
        assert torch.equal(seen, whole)


def test_everything_wrong_is_listed(published, tmp_path):
    folder, _ = published
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / INDEX).unlink()
    first = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(first)
    name, tensor = next(iter(tensors.items()))
    changed = {n: t for n, t in tensors.items() if n != name} | {name + "x": tensor}
    other = next(n for n in changed if changed[n].dim() == 2)
    changed[other] = changed[other][:1].clone()
    save_file(changed, first)
    model = gptoss_dist.GptOss(open_pretrained(f"hf:{folder}").config)
    with pytest.raises(ValueError) as error:
        load_into(dict(model.named_parameters()), open_pretrained(f"hf:{broken}"))
    for expected in (f"{name} is missing", f"{name}x is not expected", f"{other} has shape (1,"):
        assert expected in str(error.value)

    with pytest.raises(ValueError, match=r"num_local_experts .6 there, 8 here"):
        config = gptoss_dist.ModelConfig(**SIZES | {"num_local_experts": 8})
        check_architecture(open_pretrained(f"hf:{folder}"), config)
    (folder_with_index := tmp_path / "indexed").mkdir()
    shutil.copytree(folder, folder_with_index, dirs_exist_ok=True)
    sorted(folder_with_index.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00004.safetensors cannot be read: No such file"):
        open_pretrained(f"hf:{folder_with_index}")
    with open(first, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=first.name):
        open_pretrained(f"hf:{broken}")
    for where, message in (
        ("hf:nowhere", "no folder nowhere"),
        ("gguf:x", "gguf is no known format"),
        ("nowhere", "no complete checkpoint in nowhere: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pretrained(where)


def test_variants_are_refused_by_name(published, tmp_path):
    source = open_pretrained(f"hf:{published[0]}")
    variant = gptoss_dist.ModelConfig(
        **SIZES | {"num_shared_experts": 1, "sink_clamp": [-10, 15], "router_bias": False, "rope_pruned_fraction": 0.25}
    )
    for layout in ("hf", "openai"):
        with pytest.raises(ValueError) as error:
            export(source._replace(config=variant), tmp_path / "no", layout)
        for field in ("num_shared_experts=1", "sink_clamp=[-10, 15]", "router_bias=False", "rope_pruned_fraction=0.25"):
            assert field in str(error.value)
    with pytest.raises(ValueError, match="multiples of 32: intermediate_size=48"):
        odd = gptoss_dist.ModelConfig(**SIZES | {"intermediate_size": 48})
        export(source._replace(config=odd), tmp_path / "no", "hf", pack=True)
    export(source._replace(config=variant), tmp_path / "bare", "safetensors", dtype=torch.float32)
    bare = load_file(tmp_path / "bare" / "model.safetensors")
    assert bare.keys() == source.tensors.keys()
    with pytest.raises(ValueError, match="is there already"):
        export(source, tmp_path / "bare", "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_flags_are_not_ignored(published, tmp_path):
    with pytest.raises(ValueError, match="search chooses the scales that pack writes"):
        export(open_pretrained(f"hf:{published[0]}"), tmp_path / "no", "hf", search=True)
    with pytest.raises(ValueError, match="pack needs format hf or openai"):
        export(open_pretrained(f"hf:{published[0]}"), tmp_path / "no", "safetensors", pack=True)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 16.0}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, rope):
    values = {"model_type": "gpt_oss", **SIZES, "max_position_embeddings": 512, **rope}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig.from_pretrained(tmp_path)).eval()
    ours = gptoss_dist.GptOss(huggingface.read_config(tmp_path)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert near(logits(ours), logits(theirs))


def test_a_rotary_embedding_that_is_not_known_is_refused(tmp_path):
    for rope, message in (
        ({"rope_type": "linear", "factor": 2.0}, "rope_type=linear"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale"),
    ):
        values = {"model_type": "gpt_oss", **SIZES, "rope_scaling": rope}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            huggingface.read_config(tmp_path)


def test_ids_that_end_a_text_stay(published, tmp_path):
    folder = tmp_path / "instruct"
    shutil.copytree(published[0], folder)
    values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [7, 8], "pad_token_id": 9}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 9}')
    export(open_pretrained(f"hf:{folder}"), tmp_path / "new", "hf")
    model = load_transformers(tmp_path / "new")
    for settings in (model.config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == ([7, 8], 9)
    said = []
    export(open_pretrained(f"hf:{folder}"), tmp_path / "original", "openai", message=said.append)
    assert "no tokenizer and no generation settings" in said[1]
    assert any("left in" in line and "generation_config.json" in line for line in said)


def test_an_export_is_on_disk_before_it_has_its_name_and_its_name_is_too(published, tmp_path, monkeypatch):
    """Files, then the folder, then the name, then the folder around it: a loss of power leaves a model or none."""
    done = []
    monkeypatch.setattr(disk, "sync_path", lambda path: done.append(path.name))
    monkeypatch.setattr("gptoss_dist.checkpoint.formats.export.sync_path", lambda path: done.append(path.name))
    monkeypatch.setattr(disk, "sync_file", lambda file: done.append(Path(file.name).name))
    monkeypatch.setattr(disk, "move", lambda source, target: (done.append("move"), os.rename(source, target)))
    export(open_pretrained(published[0]), tmp_path / "out", "hf")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in done[:-3] if not name.startswith(".")} == written and len(written) > 2
    assert done[-3].startswith(".out.tmp-") and done[-2:] == ["move", tmp_path.name]


def test_inspect(published):
    text = describe(f"hf:{published[0]}")
    assert "model.layers.2.mlp.experts.down_proj  bfloat16 [6, 64, 64]" in text
    assert "sliding_window: 16" in text


@pytest.mark.parametrize("name", PATTERNS)
def test_tokenizer_for_transformers(tmp_path, name):
    """Every way of cutting text into words, with the built-in ranks."""
    tokenizer = load_tokenizer("bytes" if name == "bytes" else "builtin")
    tokenizer = Tokenizer(name, tokenizer.ranks, PATTERNS[name], tokenizer.special_tokens)
    for file, values in huggingface_files(tokenizer, 256).items():
        (tmp_path / file).write_text(json.dumps(values))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "def f(x):\n    return x + 1\n\n\n",
        "Grüße, 世界! \U0001f600 2024 123456789 1.5e-10",
        "  \t x\r\n  ",
        "don't DON'T a'b",
        "",
    ]
    texts.append(Path(__file__).read_text("utf-8"))
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot_id and len(theirs) == tokenizer.n_vocab
