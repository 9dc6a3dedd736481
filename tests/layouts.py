"""Layouts to be compared with one process, and a script that trains them in each process of one launch:

torchrun ... tests/layouts.py CASES.json FOLDER
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reference import LR, micro_batches, settings
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gptoss_dist.config import Config
from gptoss_dist.engine import FsdpEngine
from gptoss_dist.parallel.context import Context, finish, start
from gptoss_dist.parallel.mesh import local

SAMPLES, STEPS = 4, 4


@dataclass
class Case:
    """One layout and what is special about it."""

    name: str
    world: int
    ep: int | str = 1
    replicate: int = 1
    options: dict = field(default_factory=dict)
    """Settings, such as {"train.compile": True}."""
    model: dict = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)
    """Experts that no token is sent to."""

    def config(self) -> Config:
        config = settings(**{"num_local_experts": 8, "num_hidden_layers": 2} | self.model)
        config.optim.clip_norm = 0.3
        config.parallel.expert_parallel, config.parallel.replicate = self.ep, self.replicate
        for key, value in self.options.items():
            section, name = key.split(".")
            assert hasattr(getattr(config, section), name), key
            setattr(getattr(config, section), name, value)
        return config

    @torch.no_grad()
    def silence(self, model: nn.Module) -> None:
        """Give the routers a bias against the silent experts that no token overcomes."""
        for name, p in model.named_parameters():
            if self.silent and name.endswith("router.bias"):
                full = torch.zeros(p.shape)
                full[self.silent] = -30.0
                if isinstance(p, DTensor):
                    full = distribute_tensor(full, p.device_mesh, p.placements)
                local(p).copy_(local(full))


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on every process."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names and bits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def train(case: Case, context: Context, folder: Path) -> None:
    """Train and write what `test_layouts.py` looks at."""
    engine = FsdpEngine(case.config(), context)
    parameters = dict(engine.model.named_parameters())
    report = {
        "initial": digest(gathered(parameters)),
        "layout": str(engine.layout),
        "local": {n: list(local(p).shape) for n, p in parameters.items()},
        "rows": [],
        "traffic": [],
    }
    case.silence(engine.model)
    share = slice(context.rank * SAMPLES // context.world_size, (context.rank + 1) * SAMPLES // context.world_size)
    for step in range(STEPS):
        batches = [{k: t[share] for k, t in b.items()} for b in micro_batches(step, SAMPLES)]
        engine.evaluate(batches[:1])  # leaves no trace in what follows
        engine.forward_backward(batches)
        if step == 0:
            gradients = gathered({n: p.grad for n, p in engine.model.named_parameters()})
        result = engine.update(LR)
        report["rows"].append([float(x) for x in (result.loss, result.aux, result.z, result.grad_norm)])
        report["traffic"].append(None if result.traffic_R3 is None else result.traffic_R3.tolist())
    report["counts"] = result.counts_LE.tolist()
    weights = gathered({n: t for n, t in engine.state().items() if n.startswith("model.")})
    if context.is_main:
        save_file(gradients, folder / f"{case.name}.gradients.safetensors")
        save_file(
            {n.removeprefix("model."): t for n, t in weights.items()}, folder / f"{case.name}.weights.safetensors"
        )
        (folder / f"{case.name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    context = start()
    for values in json.loads(Path(sys.argv[1]).read_text()):
        train(Case(**values), context, Path(sys.argv[2]))
    finish()
