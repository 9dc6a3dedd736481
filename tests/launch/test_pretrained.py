"""From another tool's model, through training, to another tool."""

import shlex

import pytest
import torch

import gptoss_dist
from data_pipeline import BatchLoader, TokenDataset
from gptoss_dist.config import load_config
from gptoss_dist.engine.optimizer import is_decayed
from tests.support.ranks import MODEL, run

pytestmark = pytest.mark.distributed

transformers = pytest.importorskip("transformers")
SAMPLES, STEPS, LR = 8, 2, 3e-4
TEMPLATE = "{{ messages }}"


@pytest.fixture
def published(tmp_path):
    """A model made and saved by transformers, in float32."""
    torch.manual_seed(1)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**MODEL, attn_implementation="eager"))
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5}')
    return folder


def trained_by_hand(folder, settings) -> dict[str, torch.Tensor]:
    """The same steps in plain torch on transformers' model; its weights."""
    config = load_config(settings)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).train()
    dataset = TokenDataset(config.data.path, seq_len=config.data.seq_len, split="train", seed=config.run.seed)
    loader = BatchLoader(
        dataset,
        micro_batch_size=SAMPLES,
        accumulation=1,
        rank=0,
        world_size=1,
        samples_consumed=0,
        document_mask=False,
        prefetch=0,
    )
    groups = [[], []]
    for name, parameter in model.named_parameters():
        groups[is_decayed(name)].append(parameter)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": optim.weight_decay}],
        lr=LR,
        betas=tuple(optim.betas),
        eps=optim.eps,
    )
    for _ in range(STEPS):
        (batch,) = next(loader)
        logits = model(batch["input_ids"]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5  # clipping is active
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "processes, engine",
    [
        (4, ["--parallel.expert_parallel", "2"]),
        (2, ["--parallel.expert_parallel", "2", "--engine.zero_stage", "3"]),
        (2, ["--parallel.expert_parallel", "2", "--engine.zero_stage", "1"]),
    ],
    ids=["fsdp 4x2", "zero-3 2x2", "zero-1 2x2"],
)
def test_trained_from_open_weights_as_transformers_would(settings, tmp_path, published, processes, engine):
    options = [
        *shlex.split(
            f"--config {settings} --init.from hf:{published} --train.steps {STEPS} "
            f"--train.micro_batch_size {SAMPLES // processes} --train.gradient_accumulation 1 --loss.aux_coef 0 "
            f"--loss.z_coef 0 --optim.schedule constant --optim.warmup_steps 0 --optim.clip_norm 0.5 --optim.lr {LR} "
            "--validation.every 0"
        ),
        *engine,
    ]
    run("launch/train.py", *options, processes=processes)
    log = (tmp_path / "tiny" / "log.txt").read_text()
    assert f"started from the weights of {published}" in log
    run(
        "launch/convert.py",
        "export",
        str(tmp_path / "tiny"),
        *shlex.split(f"--output {tmp_path / 'new'} --dtype float32 --max-file-gb 0.0001"),
    )
    model, report = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = trained_by_hand(published, settings)
    before = transformers.GptOssForCausalLM.from_pretrained(published, dtype=torch.float32).state_dict()
    for name, parameter in model.named_parameters():
        # A step moves a weight by LR; Adam turns rounding into steps where a gradient is close to zero.
        assert (parameter - expected[name]).abs().max() <= 1e-5, name
        assert not torch.equal(parameter, before[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.decode(tokenizer.encode("Some text.")) == "Some text."
    assert tokenizer.chat_template == TEMPLATE and model.generation_config.eos_token_id == [1, 2]


def test_weights_of_another_run(settings, tmp_path):
    """Only the weights: step and optimizer begin anew; and a resumed run does not read them again."""
    options = ["--config", str(settings), "--validation.every", "0", "--train.steps", "2"]
    run("launch/train.py", *options)
    first = gptoss_dist.load_pretrained(tmp_path / "tiny").state_dict()
    again = [*options, "--run.dir", str(tmp_path / "again"), "--optim.lr", "0"]
    run("launch/train.py", *again, "--init.from", str(tmp_path / "tiny"))
    second = gptoss_dist.load_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    (tmp_path / "tiny").rename(tmp_path / "gone")
    run("launch/train.py", *again, "--init.from", str(tmp_path / "tiny"), "--resume", "auto", "--train.steps", "3")
    done = run("launch/train.py", *options, "--init.from", f"openai:{tmp_path}", expect=2)
    assert len(done.stderr.splitlines()) == 1 and "config.json" in done.stderr
    done = run(
        "launch/train.py",
        *options,
        *shlex.split(f"--init.from {tmp_path / 'gone'} --model.num_local_experts 2"),
        expect=2,
    )
    assert len(done.stderr.splitlines()) == 1 and "num_local_experts (4 there, 2 here)" in done.stderr
