"""An export in programs that people use: vLLM, transformers and llama.cpp serve it, TRL trains it and gives it back.

docs/proofs.md has the commands by hand, and what they gave.
"""

import os
import shlex

import pytest
import torch

import gptoss_dist
from data_pipeline import Tokenizer
from tests.support.clients import ask, interpreter
from tests.support.ranks import ROOT, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROMPTS = ["def ", "import os\n", "class A:\n    def __init__(self, value=None):\n        self.value = value\n" * 5]
TOKENS = 16
QUIET = shlex.split("--validation.every 0 --sampling.prompts '[]' --tracking.mlflow false --tracking.plots false")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def exported(request, tmp_path_factory):
    """A model of the quickstart's shape after a few steps, as an export in float32."""
    folder = tmp_path_factory.mktemp("tied" if request.param else "untied")
    data = folder / "data"
    from data_pipeline.prepare.__main__ import main

    assert main(["synthetic", "--output", str(data), "--tokenizer", "builtin", "--max-documents", "200"]) == 0
    tied = str(request.param).lower()
    run(
        "launch/train.py",
        *shlex.split(
            f"--config {ROOT}/configs/quickstart.yaml --data.path {data} --data.seq_len 64 --run.dir {folder}/run "
            f"--model.tie_word_embeddings {tied} --train.steps 12 --optim.warmup_steps 2 --checkpoint.every 12"
        ),
        *QUIET,
    )
    run("launch/convert.py", "export", str(folder / "run"), "--output", str(folder / "export"), "--dtype", "float32")
    return folder / "export"


def check(folder, found: dict) -> None:
    """Compare what a program made of the prompts with what this project makes of them, in float32."""
    tokenizer, model = Tokenizer.load(folder), gptoss_dist.load_pretrained(folder)
    for prompt, continued, scores in zip(PROMPTS, found["ids"], found["scores"], strict=True):
        ids = tokenizer.encode(prompt).tolist()
        output = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, temperature=0.0)
        assert output[0, len(ids) :].tolist() == continued
        with torch.no_grad():
            logits = model(output)[0, len(ids) - 1 : -1]
        ours = logits.log_softmax(-1).gather(1, output[0, len(ids) :, None])[:, 0]
        assert (ours - torch.tensor(scores)).abs().max() < 1e-3


def test_vllm_serves_it(exported):
    found = ask("vllm", "vllm_greedy.py", exported, PROMPTS, TOKENS)
    check(exported, found)
    tokenizer = Tokenizer.load(exported)
    assert found["prompts"] == [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    special = tokenizer.special_tokens
    assert found["chat"] == [
        special["<|start|>"],
        *tokenizer.encode("user"),
        special["<|message|>"],
        *tokenizer.encode("hi"),
        special["<|end|>"],
        special["<|start|>"],
        *tokenizer.encode("assistant"),
    ]
    assert found["stops"] == [special["<|return|>"], special["<|endoftext|>"], special["<|call|>"]]


def test_transformers_serves_it(exported):
    found = ask("transformers", "transformers_greedy.py", exported, PROMPTS, TOKENS)
    check(exported, found)
    tokenizer = Tokenizer.load(exported)
    assert found["prompts"] == [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    assert found["texts"] == [tokenizer.decode(ids) for ids in found["ids"]]
    assert found["chat"] == "<|start|>user<|message|>hi<|end|><|start|>assistant"


def test_llama_cpp_serves_it(exported, tmp_path):
    if "LLAMA_CPP_SOURCE" not in os.environ:
        pytest.skip("LLAMA_CPP_SOURCE is not set; see docs/testing.md")
    found = ask("xllamacpp", "llama_cpp_greedy.py", exported, PROMPTS, TOKENS, tmp_path / "model.gguf")
    check(exported, found)
    assert found["lengths"] == [len(Tokenizer.load(exported).encode(prompt)) for prompt in PROMPTS]


def test_trl_trains_it_and_it_comes_back(exported, tmp_path):
    """The chat template is not written here; PEFT's adapters are refused by name before they are merged."""
    interpreter("trl")
    found = ask("trl", "trl_sft.py", exported, tmp_path / "sft", 3)
    talk = "<|start|>user<|message|>What is 0 + 1?<|end|><|start|>assistant<|channel|>final<|message|>1<|return|>"
    assert found["text"] == talk
    assert len(found["losses"]) == 3 and found["losses"][-1] < found["losses"][0]
    assert (tmp_path / "sft" / "chat_template.jinja").read_text() == (exported / "chat_template.jinja").read_text()
    run(
        "launch/train.py",
        *shlex.split(
            f"--config {ROOT}/configs/quickstart.yaml --init.from hf:{tmp_path}/sft --data.path {exported.parent}/data "
            f"--data.seq_len 64 --run.dir {tmp_path}/run --train.steps 1 --optim.lr 0 --optim.warmup_steps 0"
        ),
        *QUIET,
    )
    run("launch/convert.py", "export", str(tmp_path / "run"), "--output", str(tmp_path / "again"), "--dtype", "float32")
    one, two = (gptoss_dist.load_pretrained(tmp_path / name).state_dict() for name in ("sft", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    template = (exported / "chat_template.jinja").read_text()
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == template


def test_an_adapter_of_peft_is_called_one_and_its_model_is_read(exported, tmp_path):
    found = ask("peft", "peft_adapter.py", exported, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"holds an adapter \(LORA for .*\), not a model; merge it with PEFT"):
        gptoss_dist.load_pretrained(tmp_path / "adapter")
    model = gptoss_dist.load_pretrained(tmp_path / "merged")
    with torch.no_grad():
        ours = model(torch.arange(8)[None])[0, -1]
    assert (ours - torch.tensor(found["logits"])).abs().max() < 1e-4
