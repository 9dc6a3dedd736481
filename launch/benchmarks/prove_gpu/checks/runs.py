"""Items `quickstart`, `resume`, `zero-2` and `variants`: the commands that a user types, on the quickstart's model."""

import json
import math
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import gptoss_dist.train.loop  # noqa: F401 -- so that the forks of a rehearsal have it
from gptoss_dist import checkpoint
from gptoss_dist.config import load_config
from gptoss_dist.distributed.processes import init_distributed, shut_down
from gptoss_dist.engine import build_engine
from gptoss_dist.tracking.tracker import read_metrics
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings
from launch.benchmarks.prove_gpu.checks.commands import run_command
from launch.benchmarks.prove_gpu.findings import ROOT, Findings, run_item

TINY = {
    "model.vocab_size": 272,
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.head_dim": 8,
    "model.num_local_experts": 4,
    "data.seq_len": 48,
    "train.micro_batch_size": 2,
    "validation.samples": 4,
    "sampling.max_new_tokens": 4,
}
QUIET = {
    "optim.warmup_steps": 0,
    "optim.lr": 3e-4,  # a few steps without a warm-up, whose losses are to be compared
    "validation.every": 0,
    "sampling.prompts": "[]",
    "checkpoint.every": 0,
}
ZERO_TOLERANCE = 1e-3
"""By how much losses of two engines may differ in float32 after twenty steps, as a share."""


def prepared_data(findings: Findings, work: Path) -> Path:
    """Prepare the quickstart's data unless an earlier item has; of a rehearsal, two hundred made-up documents."""
    folder, start = work / "data", time.perf_counter()
    if not (folder / "manifest.json").exists():
        source = ["pystdlib", "--tokenizer", "builtin"]
        if findings.rehearse:
            source = ["synthetic", "--tokenizer", "bytes", "--max-documents", "200", "--validation-fraction", "0.2"]
        words = ["-m", "data_pipeline.prepare", *source, "--output", str(folder)]
        run_command(words, fork=findings.rehearse)
        findings.figure("preparing the data", time.perf_counter() - start, "s")
    return folder


def train(findings: Findings, work: Path, name: str, settings: dict[str, object]) -> Path:
    """Train the quickstart's model with some settings, and return the folder of the run."""
    folder = work / "runs" / name
    settings = {
        "data.path": prepared_data(findings, work),
        "run.name": name,
        "run.dir": folder,
        "tracking.mlflow": "false",
        "tracking.plots": "false",
        **(TINY if findings.rehearse else {}),
        **settings,
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    start = time.perf_counter()
    words = [str(ROOT / "launch/train.py"), "--config", str(ROOT / "configs/quickstart.yaml"), *options]
    run_command(words, fork=findings.rehearse)
    findings.figure(f"{name}: the whole command", time.perf_counter() - start, "s", f"{settings['train.steps']} steps")
    return folder


def values(folder: Path, name: str) -> dict[int, float]:
    """Return {step: value} of a metric of a run."""
    return {row["step"]: row["metrics"][name] for row in read_metrics(folder) if name in row["metrics"]}


def check_device(findings: Findings, name: str, folder: Path) -> None:
    """Check that a run trained on the GPU, where there is one."""
    peak = values(folder, "perf/memory_peak_allocated_gib")
    if torch.cuda.is_available():
        findings.check(f"{name}: trained on the GPU", max(peak.values(), default=0.0) > 0, "it holds memory there")


def report_speed(findings: Findings, name: str, folder: Path) -> None:
    rates = list(values(folder, "perf/tokens_per_s").values())[5:]
    if rates:
        findings.figure(f"{name}: tokens/s", statistics.median(rates), "", f"median of {len(rates)} steps")


def quickstart(findings: Findings, work: Path) -> None:
    """Go the way of `launch/quickstart.sh`, with fewer steps."""
    steps = 8 if findings.rehearse else 300
    short = {
        "train.steps": steps,
        "optim.warmup_steps": min(30, steps // 10),
        "validation.every": steps,
        "sampling.every": steps,
        "checkpoint.every": steps,
    }
    folder = train(findings, work, "quickstart", short)
    check_device(findings, "quickstart", folder)
    losses, validation = values(folder, "loss/train"), values(folder, "loss/val")
    findings.check("every step is recorded", sorted(losses) == list(range(1, steps + 1)), f"{len(losses)} of {steps}")
    first, last = validation[min(validation)], validation[max(validation)]
    wanted = first if findings.rehearse else 0.75 * first
    findings.check("the validation loss falls", last < wanted, f"{first:.3f} to {last:.3f}, below {wanted:.3f} wanted")
    report_speed(findings, "quickstart", folder)
    findings.check("there is a checkpoint", any((folder / "checkpoints").glob("step_*")), f"step {steps}")
    words = [
        str(ROOT / "launch/generate.py"),
        "--checkpoint",
        str(folder),
        "--prompt",
        "def ",
        "--max-new-tokens",
        "32",
    ]
    text = run_command(words, fork=findings.rehearse)
    findings.check("it writes text", len(text.strip()) > len("def"), f"{len(text)} characters")
    findings.text("text after training", text)


def resume(findings: Findings, work: Path) -> None:
    """Check a run that was interrupted against one that was not, and a loaded checkpoint against what was saved."""
    half, steps = (3, 6) if findings.rehearse else (10, 20)
    settings = QUIET | {"train.steps": steps, "checkpoint.every": half, "checkpoint.asynchronous": "false"}
    straight = train(findings, work, "straight", settings)
    saved = straight / "checkpoints" / f"step_{half:08d}"
    resumed = train(findings, work, "resumed", settings | {"resume": saved})
    again = train(findings, work, "again", settings)
    check_device(findings, "straight", straight)
    a, b, c = (values(folder, "loss/train") for folder in (straight, resumed, again))
    findings.check(
        "it goes on where it was", sorted(b) == list(range(half + 1, steps + 1)), f"steps {min(b)} to {max(b)}"
    )
    noise = max(abs(a[step] - c[step]) for step in a)
    difference = max(abs(a[step] - b[step]) for step in b)
    findings.figure("a repeated run differs by", noise, "nats", "0 where all kernels are deterministic")
    findings.figure("a resumed run differs by", difference, "nats")
    detail = f"{difference:.1e}, where repeating the whole run gives {noise:.1e}"
    findings.check("a resumed run is as near as a repeated one", difference <= 10 * noise, detail)
    last = f"step_{steps:08d}"
    if noise == 0:
        equal = differing(straight / "checkpoints" / last, resumed / "checkpoints" / last)
        findings.check("the last checkpoint is equal bit for bit", not equal, ", ".join(equal[:3]) or "all tensors")
    check_loading(findings, work, saved)


def check_loading(findings: Findings, work: Path, saved: Path) -> None:
    """Load a checkpoint into a model with other weights, save that, and compare every bit."""
    config = load_config(ROOT / "configs/quickstart.yaml", overrides={"run.seed": 99} | model_of(findings))
    engine = build_engine(engine_settings(config), init_distributed(), next_token_prediction)
    state = engine.state()
    checkpoint.load_state(saved, state)
    engine.load(state)
    saver = checkpoint.Saver(work / "loaded", keep=checkpoint.Retention(0), asynchronous=False)
    saver.save(1, engine.state(), {})
    saver.close()
    wrong = differing(saved, work / "loaded/step_00000001")
    findings.check("what was loaded is what was saved, bit for bit", not wrong, ", ".join(wrong[:3]) or "all tensors")
    shut_down()


def model_of(findings: Findings) -> dict[str, object]:
    return {key: value for key, value in TINY.items() if key.startswith("model.")} if findings.rehearse else {}


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of the tensors of two checkpoints that are not equal bit for bit."""
    a, b = tensors(one), tensors(other)
    return [
        name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b or not equal(a[name], b[name])
    ]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def zero_2(findings: Findings, work: Path) -> None:
    """Check ZeRO-2 against FSDP2, on the same steps as the item `resume`."""
    steps = 6 if findings.rehearse else 20
    settings = QUIET | {"train.steps": steps}
    fsdp = work / "runs/straight"
    if len(values(fsdp, "loss/train") if fsdp.exists() else {}) < steps:
        fsdp = train(findings, work, "fsdp", settings)
    zero = train(findings, work, "zero-2", settings | {"engine.kind": "deepspeed", "engine.zero_stage": 2})
    check_device(findings, "zero-2", zero)
    a, b = values(fsdp, "loss/train"), values(zero, "loss/train")
    difference = max(abs(a[step] - b[step]) / a[step] for step in range(1, steps + 1))
    detail = f"losses of {steps} steps differ by {difference:.1e} at most, of {ZERO_TOLERANCE:.0e}"
    findings.check("ZeRO-2 trains as FSDP2 does", difference <= ZERO_TOLERANCE, detail)
    report_speed(findings, "fsdp", fsdp)
    report_speed(findings, "zero-2", zero)
    saved = json.loads(next((zero / "checkpoints").glob("step_*/checkpoint.json")).read_text())
    findings.check("it is ZeRO-2 that trained", "ZeRO-2" in saved["layout"], saved["layout"])


def variants(findings: Findings, work: Path) -> None:
    """Train a few steps in ways that no CPU shows; in a rehearsal none of them compiles."""
    steps, compiled = (3, {}) if findings.rehearse else (20, {"train.compile": "true"})
    graphs = compiled and compiled | {"train.compile_mode": "reduce-overhead"}
    for name, settings in {
        "compiled": compiled,
        "replay": {"train.routing": "replay"} | graphs,
        "varlen": {"data.packing": "varlen"} | compiled,
    }.items():
        try:
            folder = train(findings, work, name, QUIET | {"train.steps": steps} | settings)
        except SystemExit as failure:  # the others are runs of their own
            findings.check(f"{name}: it trains", False, str(failure))
            continue
        losses = values(folder, "loss/train")
        detail = f"{len(losses)} steps, {losses[1]:.3f} to {losses[max(losses)]:.3f}"
        right = len(losses) == steps and all(map(math.isfinite, losses.values()))
        findings.check(f"{name}: every step has a loss", right, detail)
        check_device(findings, name, folder)
        report_speed(findings, name, folder)


if __name__ == "__main__":
    run_item({"quickstart": quickstart, "resume": resume, "zero-2": zero_2, "variants": variants}, __doc__)
