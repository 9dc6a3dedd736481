"""The MoE layer asks the device for something once per forward pass: how many rows the all-to-alls carry."""

import pytest
import torch
import torch.distributed as dist

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.moe import MoE
from gptoss_dist.parallel.exchange import Exchange
from gptoss_dist.parallel.experts import DroplessExperts
from gptoss_dist.parallel.recompute import checkpoint_activations
from gptoss_dist.planner.tracing.host_reads import HostReadWatch, documented


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


def watch(moe: MoE) -> tuple[HostReadWatch, HostReadWatch]:
    """The forward and the backward pass. On CPU tensors the same code runs, and waits for nothing."""
    x_BTD = torch.randn(2, 20, 32, requires_grad=True)
    with HostReadWatch("cpu") as forward:
        y_BTD, stats = moe(x_BTD)
        loss = y_BTD.square().sum() + stats.probability_E.square().sum() + stats.z
    with HostReadWatch("cpu") as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("spread, expected", [(False, []), (True, ["tolist"])])
def test_the_host_waits_at_most_once(spread, expected):
    forward, backward = watch(layer(spread, router_selection_bias=True))
    assert forward.calls == expected and backward.calls == []
    assert all(documented(read) for read in forward.reads)


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
    with HostReadWatch("cpu") as seen:
        x = torch.tensor([1.0, 0.0])
        x[0].item(), x.nonzero(), x.cpu(), x.to("cpu"), bool(x[0] > 0), x[x > 0], torch.nonzero(input=x), x.unique()
        torch.repeat_interleave(x, torch.tensor([1, 2])), x.repeat_interleave(2), torch.equal(x, x)
        torch.ops.aten._local_scalar_dense(x[0])
    assert seen.calls == [
        *("item", "nonzero", "cpu", "to", "__bool__", "index by a mask", "nonzero", "_unique2"),
        *("repeat_interleave", "equal", "_local_scalar_dense"),
    ]
    assert {(read.file, read.function) for read in seen.reads} == {
        ("tests/parallel/test_host_syncs.py", "test_the_watch_sees_what_it_is_for")
    }
