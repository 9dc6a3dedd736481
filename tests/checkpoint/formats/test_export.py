"""What an export holds, says and refuses, so that the tools which people serve with load it or are named."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptoss_dist
from data_pipeline import disk
from gptoss_dist.checkpoint.formats import export as export_module
from gptoss_dist.checkpoint.formats import huggingface
from gptoss_dist.checkpoint.formats.checksums import FILE, altered_files
from gptoss_dist.checkpoint.formats.companions import companions_to_carry
from gptoss_dist.checkpoint.formats.export import export
from gptoss_dist.checkpoint.formats.pretrained import check_architecture, open_pretrained
from gptoss_dist.checkpoint.formats.tensor_files import INDEX

RUN = Path(__file__).parents[1] / "fixtures" / "step_00000003"
ROOT = Path(__file__).parents[3]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def model(**fields) -> gptoss_dist.GptOss:
    torch.manual_seed(0)
    made = gptoss_dist.GptOss(gptoss_dist.ModelConfig(**SIZES | fields))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    return made.eval()


def logits(any_model) -> torch.Tensor:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = any_model(ids)
    return getattr(found, "logits", found).float()


def saved(folder: Path, **fields) -> Path:
    gptoss_dist.save_pretrained(model(**fields), folder, dtype=torch.float32)
    return folder


def rewrite(folder: Path, **values) -> None:
    """Change config.json by hand, as the owner of a folder without checksums may."""
    path = folder / "config.json"
    written = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in written.items() if value != "left out"}))
    (folder / FILE).unlink(missing_ok=True)


@pytest.mark.parametrize("head_dim, theta, length", [(16, 150000.0, 64), (64, 1e6, 2048), (96, 150000.0, 131072)])
def test_a_model_without_rotary_scaling_is_yarn_with_factor_1_to_the_last_bit(tmp_path, head_dim, theta, length):
    transformers = pytest.importorskip("transformers")
    fields = {"head_dim": head_dim, "rope_theta": theta, "rope_scaling": None, "max_position_embeddings": length}
    folder = saved(tmp_path / "new", **fields)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert rope["factor"] == 1 and rope["rope_type"] == "yarn"
    assert rope["original_max_position_embeddings"] == length  # vLLM multiplies it by the factor
    load = transformers.GptOssForCausalLM.from_pretrained
    scaled = load(folder, attn_implementation="eager", dtype=torch.float32)
    config = transformers.GptOssConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    plain = load(folder, config=config, attn_implementation="eager", dtype=torch.float32)
    assert plain.model.rotary_emb.rope_type == "default" and scaled.model.rotary_emb.rope_type == "yarn"
    assert torch.equal(logits(scaled), logits(plain))
    assert open_pretrained(folder).config.rope_scaling is None
    check_architecture(open_pretrained(folder), model(**fields).config)


ROPE = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "truncate": False,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "rope_theta": 1e4,
}
NESTED = {"full_attention": ROPE, "sliding_attention": ROPE}


@pytest.mark.parametrize(
    "form",
    [
        {"rope_parameters": ROPE},
        {"rope_parameters": NESTED},
        {"rope_parameters": {"rope_theta": 1e4, **{kind: {**ROPE, "rope_theta": None} for kind in NESTED}}},
        {"rope_parameters": NESTED, "rope_scaling": {**ROPE, "rope_theta": None}, "rope_theta": 1e4},
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {**ROPE, "truncate": None}},
    ],
    ids=["flat", "nested", "nested with a common theta", "twice", "all dimensions", "null for false"],
)
def test_a_rotary_embedding_is_read_in_all_its_forms(tmp_path, form):
    folder = saved(tmp_path / "new")
    rewrite(folder, **{"rope_theta": "left out", "rope_scaling": None} | form)
    config = huggingface.read_config(folder)
    assert config.rope_theta == 1e4 and dataclasses.asdict(config.rope_scaling).items() <= ROPE.items()


@pytest.mark.parametrize(
    "form, message",
    [
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, r"parameters has no rope_type but says factor=8"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling has no rope_type but says factor=2"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, r"rope_type default but says factor=8"),
        (
            {"rope_parameters": {**NESTED, "full_attention": {**ROPE, "factor": 4.0}}},
            r"rope_parameters.full_attention and rope_parameters.sliding_attention differ",
        ),
        ({"rope_parameters": ROPE, "rope_scaling": {**ROPE, "factor": 2.0}}, r"rope_scaling and rope_param.* differ"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {**ROPE, "rope_type": "llama3"}}}, r"rope_type=llama3 is not"),
        ({"rope_parameters": "yarn"}, r"rope_parameters=\"yarn\" must be"),
        ({"rope_parameters": None}, r"rope_parameters or rope_scaling is empty"),
        ({"rope_parameters": "left out", "rope_scaling": {}}, r"rope_parameters or rope_scaling is empty"),
        ({"rope_parameters": {**ROPE, "factor": 0.5}}, r"factor=0.5"),
    ],
)
def test_a_rotary_embedding_is_never_dropped(tmp_path, form, message):
    folder = saved(tmp_path / "new")
    rewrite(folder, **{"rope_theta": "left out", "rope_scaling": None, "rope_parameters": None} | form)
    with pytest.raises(ValueError, match=message) as error:
        huggingface.read_config(folder)
    assert str(folder / "config.json") in str(error.value)


def test_a_tied_model_goes_out_with_its_head_and_comes_back_tied(tmp_path):
    transformers = pytest.importorskip("transformers")
    tied, said = model(tie_word_embeddings=True), []
    gptoss_dist.save_pretrained(tied, tmp_path / "new", dtype=torch.float32, message=said.append)
    assert any("tie_word_embeddings as false" in line for line in said)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    config = transformers.GptOssConfig.from_pretrained(tmp_path / "new")
    assert not config.tie_word_embeddings
    other = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert (logits(other) - logits(tied)).abs().max() < 1e-5
    back = check_architecture(open_pretrained(tmp_path / "new"), tied.config)
    assert torch.equal(logits(back.build()), logits(tied))
    gptoss_dist.save_pretrained(tied, tmp_path / "original", layout="openai", dtype=torch.float32)
    again = gptoss_dist.load_pretrained(f"openai:{tmp_path / 'original'}")
    assert torch.equal(logits(again), logits(tied))


def test_a_tied_model_with_a_head_is_read_if_that_is_equal(tmp_path):
    folder = saved(tmp_path / "new", tie_word_embeddings=True)
    rewrite(folder, tie_word_embeddings=True)
    assert HEAD in load_file(folder / "model.safetensors")
    assert torch.equal(logits(gptoss_dist.load_pretrained(folder)), logits(model(tie_word_embeddings=True)))
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is not equal to model.embed_tokens.weight"):
        open_pretrained(folder)
    rewrite(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"tie_word_embeddings \(False there, True here\)"):
        check_architecture(open_pretrained(folder), model(tie_word_embeddings=True).config)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({}, []),
        ({"layer_types": ["full_attention"] * 2}, ["layer_types"]),
        ({"rms_norm_eps": 1e-6, "swiglu_limit": 5.0}, ["rms_norm_eps=1e-06", "swiglu_limit=5.0"]),
        ({"swiglu_alpha": 1.0, "attention_bias": False}, ["swiglu_alpha=1.0", "attention_bias=False"]),
    ],
)
def test_settings_that_servers_do_not_read_are_named_each(tmp_path, fields, named):
    said = []
    gptoss_dist.save_pretrained(model(**fields), tmp_path / "new", message=said.append)
    lines = [line for line in said if line.startswith("transformers only: ")]
    assert len(lines) == len(named)
    assert all(any(field in line for line in lines) for field in named)


def test_the_dtype_has_both_names(tmp_path):
    gptoss_dist.save_pretrained(model(), tmp_path / "new")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"


def test_openais_layout_with_plain_numbers_is_said_to_be_for_this_project(tmp_path):
    for pack in (False, True):
        said = []
        gptoss_dist.save_pretrained(model(), tmp_path / str(pack), layout="openai", pack=pack, message=said.append)
        assert any("OpenAI's code expects the experts in MXFP4" in line for line in said) is not pack


def test_a_file_beside_an_index_is_named_and_not_read(tmp_path):
    gptoss_dist.save_pretrained(model(), tmp_path / "new", dtype=torch.float32, file_bytes=20_000)
    assert (tmp_path / "new" / INDEX).is_file()
    (tmp_path / "new" / FILE).unlink()
    save_file({EMBEDDING: torch.zeros(5, 5), "other": torch.zeros(1)}, tmp_path / "new" / "model.safetensors")
    said = []
    opened = open_pretrained(tmp_path / "new", message=said.append)
    assert any("model.safetensors is not in model.safetensors.index.json and is not read" in line for line in said)
    assert torch.equal(logits(opened.build()), logits(model()))
    (tmp_path / "new" / INDEX).unlink()
    with pytest.raises(
        ValueError, match=rf"values of {EMBEDDING} are in model-00001-of.*, model.safetensors, its shape"
    ):
        open_pretrained(tmp_path / "new")


def test_another_layout_is_refused_on_one_screen(tmp_path):
    """A mixture of experts with a tensor per expert."""
    folder = saved(tmp_path / "new")
    tensors = {
        f"model.layers.{i}.mlp.experts.{e}.{part}.weight": torch.zeros(2, 2)
        for i in range(2)
        for e in range(320)
        for part in ("w1", "w2", "w3")
    }
    tensors |= {f"extra{chr(97 + i)}.weight": torch.zeros(1) for i in range(20)}
    save_file(tensors, folder / "model.safetensors")
    (folder / FILE).unlink()
    with pytest.raises(ValueError) as error:
        gptoss_dist.load_pretrained(folder)
    assert len(str(error.value)) < 2000
    for part in (
        "more kinds of names: is missing",
        "model.layers.*.input_layernorm.weight is missing (2 tensors)",
        "model.layers.*.mlp.experts.*.w*.weight is not expected (1920 tensors)",
    ):
        assert part in str(error.value), str(error.value).replace("; ", "\n")


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_an_adapter_is_called_one(tmp_path, prefix):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "openai/x"}')
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds an adapter \(LORA for openai/x\), not a model; merge it"):
        open_pretrained(f"{prefix}{tmp_path}")


def test_what_goes_with_the_model_of_a_run(tmp_path):
    said = []
    export(open_pretrained(RUN), tmp_path / "new", "hf", license="apache-2.0", message=said.append)
    assert any(line.endswith("step_00000003: step 3") for line in said)
    special = json.loads((RUN / "tokenizer.gptoss.json").read_text())["special_tokens"]
    stops = [special[token] for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "new" / name).read_text())["eos_token_id"] == stops
    assert "<|channel|>final<|message|>" in (tmp_path / "new" / "chat_template.jinja").read_text()
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for row in (
        "| num_local_experts | 2 |",
        "| trained tokens | 192 |",
        "| trained steps | 3 |",
        "| data | data",
        "| data SHA-256 | 91b86",
    ):
        assert row in card
    # From there on, the template, the ids and the licence are those of the folder.
    (tmp_path / "new" / "chat_template.jinja").write_text("theirs")
    (tmp_path / "new" / "additional_chat_templates").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("x")
    rewrite(tmp_path / "new", bos_token_id=7, router_aux_loss_coef=0.5)
    said.clear()
    export(open_pretrained(tmp_path / "new"), tmp_path / "again", "hf", message=said.append)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "theirs"
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"]) == (stops, 7)
    assert (tmp_path / "again" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert any("left out of config.json: router_aux_loss_coef=0.5" in line for line in said)
    assert any("additional_chat_templates/, notes.txt" in line for line in said)


def test_a_template_that_a_run_began_with_goes_out_again(tmp_path):
    shutil.copytree(RUN, tmp_path / "step_00000003")
    (tmp_path / "step_00000003" / "chat_template.jinja").write_text("theirs")
    for ids, kept in (([1, 2], [1, 2]), ([1, 5000], None)):
        settings = {"eos_token_id": ids, "temperature": 0.5}
        (tmp_path / "step_00000003" / "generation_config.json").write_text(json.dumps(settings))
        said, new = [], tmp_path / str(kept)
        export(open_pretrained(tmp_path / "step_00000003", verify=False), new, "hf", message=said.append)
        assert (new / "chat_template.jinja").read_text() == "theirs"
        written = json.loads((new / "generation_config.json").read_text())
        assert (written["eos_token_id"] == ids and written["temperature"] == 0.5) is (kept is not None)
        assert any("[1, 5000] is none of the tokenizer's" in line for line in said) is (kept is None)


@pytest.fixture(scope="module")
def convert():
    """launch/convert.py in this process: its exit code."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert"] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(argument) for argument in argv])


def test_a_link_that_leads_out_of_a_model_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("{}")
    folder = saved(tmp_path / "new")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"chat_template.jinja is a link that leads out of its folder"):
        export(open_pretrained(folder), tmp_path / "again", "hf")
    with pytest.raises(ValueError, match=r"chat_template.jinja is a link that leads out of its folder"):
        companions_to_carry(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "secret"]


def test_an_export_carries_checksums_that_are_checked(tmp_path, convert, capsys):
    folder = saved(tmp_path / "new")
    assert altered_files(folder) == []
    subprocess.run(["sha256sum", "--check", "--strict", FILE], cwd=folder, check=True, capture_output=True)
    assert convert("verify", folder) == convert("verify", f"hf:{folder}") == 0
    (folder / "README.md").write_text("edited")
    said = []
    open_pretrained(folder, message=said.append)  # what is not read is said
    assert any("README.md is not what was exported" in line for line in said)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x17")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not what was exported.*delete SHA256SUMS") as error:
        open_pretrained(folder)
    assert "other.safetensors does not belong to it" in str(error.value)
    assert convert("verify", folder) == 1 and "README.md is not what was exported" in capsys.readouterr().out
    (folder / FILE).write_text("../config.json\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS, line 1: '../config.json' is not"):
        open_pretrained(folder)
    (folder / FILE).unlink()
    assert convert("verify", folder) == 2 and "carries no SHA256SUMS" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"layout": "openai", "pack": True}, {"layout": "safetensors"}])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, options):
    strange = model()
    with torch.no_grad():
        strange.model.layers[1].mlp.experts.down_proj[2, 5, 5] = float("nan")
        strange.model.norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"not finite: .*; nothing is exported") as error:
        gptoss_dist.save_pretrained(strange, tmp_path / "new", **options)
    assert "model.layers.1.mlp.experts.down_proj" in str(error.value) and "model.norm.weight" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_users_is_not_taken_for_a_temporary_one(tmp_path):
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "mine").write_text("x")
    saved(tmp_path / "new")
    assert (tmp_path / "new.tmp" / "mine").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.tmp"]


def test_of_two_exports_to_one_folder_the_second_is_refused(tmp_path, monkeypatch):
    begun, end, write = threading.Event(), threading.Event(), export_module.write_tensors

    def slow(*arguments, **options):
        begun.set()
        assert end.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(export_module, "write_tensors", slow)
    first = threading.Thread(target=saved, args=(tmp_path / "new",))
    first.start()
    assert begun.wait(60)
    with pytest.raises(ValueError, match=r"new is being written by another process; wait"):
        saved(tmp_path / "new")
    end.set()
    first.join()
    assert altered_files(tmp_path / "new") == [] and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
