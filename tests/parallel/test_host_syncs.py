"""The MoE layer asks the device for something once per forward pass: how many rows the all-to-alls carry."""

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.moe import MoE
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.experts import DroplessExperts
from gptoss_dist.parallel.recompute import checkpoint_activations

METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""Of Tensor: what makes the host wait for a CUDA tensor. On a CPU tensor the same code runs, and waits for nothing."""
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")


class Watch(TorchFunctionMode):
    """Names of the calls that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.operators = [], _Operators()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        # A literal "cpu": the device of another tensor would be CUDA there.
        to_host = name == "to" and any(isinstance(a, str) and a == "cpu" for a in (*args[1:], *kwargs.values()))
        # The length of repeats has to be read back unless the caller states it.
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in METHODS or to_host or repeats:
            self.calls.append(name)
        return function(*args, **kwargs)

    def __enter__(self):
        self.operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.operators.__exit__(*error)


class _Operators(TorchDispatchMode):
    """Sees also what the backward pass and autograd functions call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__.lstrip("_").startswith(tuple(o.lstrip("_") for o in OPERATORS)):
            self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layer(spread: bool, **fields) -> MoE:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    moe = MoE(ModelConfig(**sizes, num_shared_experts=1, **fields))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exchange = Exchange(dist.group.WORLD, torch.device("cpu")) if spread else None
    moe.experts = DroplessExperts(moe.experts, 2, exchange)
    for experts in (moe.experts, moe.shared_expert):
        experts.backend = "grouped_mm"  # that of CUDA
    return moe


def watch(moe: MoE) -> tuple[Watch, Watch]:
    """The forward and the backward pass."""
    x_BTD = torch.randn(2, 20, 32, requires_grad=True)
    with Watch() as forward:
        y_BTD, stats = moe(x_BTD)
        loss = y_BTD.square().sum() + stats.probability_E.square().sum() + stats.z
    with Watch() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("spread, expected", [(False, []), (True, ["tolist"])])
def test_the_host_waits_at_most_once(spread, expected):
    forward, backward = watch(layer(spread, router_selection_bias=True))
    assert forward.calls == expected and backward.calls == []
    assert forward.operators.calls == backward.operators.calls == []


@pytest.mark.parametrize("keep_large", [False, True])
def test_recomputation_does_not_wait_again(keep_large):
    moe = layer(True)
    checkpoint_activations(moe, keep_large=keep_large)
    forward, backward = watch(moe)
    assert forward.calls == ["tolist"] and backward.calls == []


def test_the_watch_sees_what_it_is_for():
    moe = layer(False)
    moe.experts.backend = "loop"  # which reads row counts on the host
    forward, _ = watch(moe)
    assert forward.calls == ["tolist"]
    with Watch() as seen:
        x = torch.tensor([1.0, 0.0])
        x[0].item(), x.nonzero(), x.cpu(), x.to("cpu"), bool(x[0] > 0), x[x > 0]
        torch.repeat_interleave(x, torch.tensor([1, 2]))
    assert seen.calls == ["item", "nonzero", "cpu", "to", "__bool__", "repeat_interleave"]
    assert {name.split(".")[1] for name in seen.operators.calls} >= {"nonzero", "_local_scalar_dense"}
