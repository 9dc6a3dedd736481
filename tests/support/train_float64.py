"""launch/train.py with everything in float64, to tell a mistake from rounding that grows: the same arguments, from the
root of the project, under any launcher. It ends at the first checkpoint, which cannot be written so.

    deepspeed --num_gpus 2 tests/support/train_float64.py --config configs/quickstart.yaml --train.steps 100
    torchrun --standalone --nproc_per_node 2 tests/support/train_float64.py --config configs/quickstart.yaml ...
"""

# ruff: noqa: E402
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from gptoss_dist.train import loop
from tests.support.layouts import local
from tests.support.reference import double_precision


class PlainAdamW(torch.optim.AdamW):
    """The fused kernel takes its scalars in float32 only."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **(options | {"fused": False, "foreach": False}))


def clip(optimizer: torch.optim.AdamW, *_) -> None:
    """What the fused kernel does with `grad_scale`."""
    if (scale := getattr(optimizer, "grad_scale", None)) is not None:
        for p in optimizer.state:
            local(p.grad).div_(scale)
    optimizer.grad_scale = optimizer.found_inf = None


def build(*arguments):
    engine = build_engine(*arguments)
    engine.optimizer.register_step_pre_hook(clip)
    return engine


build_engine, loop.build_engine = loop.build_engine, build
torch.optim.AdamW = PlainAdamW
with double_precision():
    sys.argv[0] = "train.py"
    runpy.run_path(str(ROOT / "launch/train.py"), run_name="__main__")
