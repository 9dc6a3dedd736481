"""Layouts to be compared with one process, and a script that trains them in each process of one launch:

torchrun ... tests/support/layouts.py CASES.json FOLDER
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gptoss_dist.checkpoint.boxes import BoxedTensor
from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks, init_distributed, shut_down
from gptoss_dist.engine import Engine, engine_kind
from gptoss_dist.parallel.mesh import local
from gptoss_dist.parallel.traffic import SentBytes
from tests.support.reference import LR, build, double_precision, micro_batches, settings

SAMPLES, STEPS = 4, 2


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
    double: bool = False
    """Everything in float64."""
    cp: int = 1
    length: int = 40
    """Tokens of a sample."""
    documents: bool = False
    """Whether attention stays within documents."""

    def config(self) -> Config:
        config = settings(**{"num_local_experts": 8, "num_hidden_layers": 2} | self.model)
        config.optim.clip_norm = 0.3
        config.parallel.expert_parallel, config.parallel.replicate = self.ep, self.replicate
        config.parallel.context_parallel = self.cp
        for key, value in self.options.items():
            section, name = key.split(".")
            assert hasattr(getattr(config, section), name), key
            setattr(getattr(config, section), name, value)
        return config

    def silence(self, model: nn.Module) -> None:
        """Give the routers of the whole model a bias against the silent experts that no token overcomes."""
        self._silence(dict(model.named_parameters()))

    def silence_in(self, engine: Engine) -> None:
        """The same for a sharded model."""
        state = engine.state()
        self._silence({name: t for name, t in state.items() if name.startswith("model.")})
        engine.load(state)

    @torch.no_grad()
    def _silence(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in weights.items():
            if self.silent and name.endswith("router.bias"):
                full = torch.zeros(tensor.shape)
                full[self.silent] = -30.0
                if isinstance(tensor, BoxedTensor):
                    for (start,), values in tensor.boxes:
                        values.copy_(full[start : start + len(values)])
                elif isinstance(tensor, DTensor):
                    local(tensor).copy_(local(distribute_tensor(full, tensor.device_mesh, tensor.placements)))
                else:
                    tensor.copy_(full)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; collective."""
    if isinstance(tensor, BoxedTensor):
        full = torch.zeros(tensor.shape)
        for offset, values in [] if tensor.is_copy else tensor.boxes:
            full[tuple(slice(o, o + n) for o, n in zip(offset, values.shape))] += values
        if dist.get_world_size() > 1:
            dist.all_reduce(full)
        return full
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, on every process."""
    return {name: whole(tensor) for name, tensor in tensors.items()}


def weights(engine: Engine) -> dict[str, Tensor]:
    """Whole master weights by the names of the model."""
    return {n.removeprefix("model."): whole(t) for n, t in engine.state().items() if n.startswith("model.")}


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names and bits."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def clip_in_double(optimizer: torch.optim.AdamW, *_) -> None:
    """The optimizer's kernel takes these in float32 only (here by its other name), whatever it steps on."""
    for p, state in optimizer.state.items():
        local(p.grad).div_(optimizer.grad_scale)
        state["step"] = state["step"].to(torch.float)
    optimizer.grad_scale, optimizer.found_inf = None, optimizer.found_inf.to(torch.float)


def train(case: Case, ranks: Ranks, folder: Path) -> None:
    """Train and write what `test_layouts.py` looks at."""
    engine = build(case.config(), ranks)
    if case.double:
        engine.optimizer.register_step_pre_hook(clip_in_double)
    parameters = dict(engine.model.named_parameters())
    sharded_by_torch = engine_kind(engine.settings.engine) == "fsdp"
    report = {
        "initial": digest(weights(engine)),
        "layout": str(engine.layout),
        "local": {n: list(local(p).shape) for n, p in parameters.items()},
        "rows": [],
        "traffic": [],
        "evaluated": [],
    }
    case.silence_in(engine)
    group, groups = ranks.rank // case.cp, ranks.world_size // case.cp
    share = slice(group * SAMPLES // groups, (group + 1) * SAMPLES // groups)
    for step in range(STEPS):
        global_batches = micro_batches(step, SAMPLES, case.length, case.documents)
        batches = [{k: t[share] for k, t in b.items()} for b in global_batches]
        report["evaluated"].append(engine.evaluate(batches[:1]))  # leaves no trace in what follows
        sent = SentBytes()
        with sent.counting(not case.config().train.compile):
            sums = engine.forward_backward(batches)
        if step == 0 and sharded_by_torch:
            gradients = gathered({n: p.grad for n, p in engine.model.named_parameters() if p.requires_grad})
        result = engine.update(sums, LR)
        report["rows"].append([float(x) for x in (result.loss, result.aux, result.z, result.grad_norm)])
        report["traffic"].append(None if result.traffic_R3 is None else result.traffic_R3.tolist())
    report["sent"] = sent.by_name
    report["counts"] = result.counts_LE.tolist()
    final = weights(engine)
    if ranks.is_main:
        if sharded_by_torch:
            save_file(gradients, folder / f"{case.name}.gradients.safetensors")
        save_file(final, folder / f"{case.name}.weights.safetensors")
        (folder / f"{case.name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = init_distributed()
    for values in json.loads(Path(sys.argv[1]).read_text()):
        case = Case(**values)
        with double_precision() if case.double else nullcontext():
            train(case, ranks, Path(sys.argv[2]))
    shut_down()
