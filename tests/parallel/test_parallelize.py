"""What is set up for two processes, seen from one: the process group is torch's fake one, which moves nothing."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.model.transformer import GptOss
from gptoss_dist.parallel.experts import use_megablocks
from gptoss_dist.parallel.mesh import build_meshes, plan_layout
from gptoss_dist.parallel.parallelize import check_compiler, place_experts
from tests.support.reference import build, micro_batches, settings


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("reshard, gathers", [(True, 2 * 3 + 1), (False, 3 + 1)])
def test_the_root_is_gathered_once(reshard, gathers):
    """The backward pass begins with the head, right after the forward pass ended with it; blocks are gathered again."""
    config = settings()
    config.parallel.reshard_after_forward = reshard
    engine = build(config, Ranks(0, 0, 2, torch.device("cpu")))
    with CommDebugMode() as seen:
        engine.forward_backward(micro_batches(0, 1)[:1])
    counts = {str(operator): count for operator, count in seen.get_comm_counts().items()}
    assert sum(count for name, count in counts.items() if "allgather" in name) == gathers, counts


def test_experts_are_spread_once():
    model, mesh = GptOss(settings().model), init_device_mesh("cpu", (2,))
    exchange = use_megablocks(model, mesh)
    assert use_megablocks(model, mesh) is exchange
    assert all(layer.mlp.experts.exchange is exchange for layer in model.model.layers)
    assert use_megablocks(model) is exchange


@pytest.mark.parametrize(
    "device_type, message", [("cpu", "computes on CUDA only"), ("cuda", "cannot be imported .* pip install")]
)
def test_grouped_gemm_is_refused_where_it_cannot_run(monkeypatch, device_type, message):
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)
    config = settings()
    config.parallel.expert_gemm, config.train.precision = "grouped_gemm", "bf16"
    meshes = SimpleNamespace(dense=SimpleNamespace(device_type=device_type))
    with pytest.raises(ValueError, match=f"parallel.expert_gemm=grouped_gemm .*{message}"):
        place_experts(GptOss(config.model), config.train.precision, config.parallel, meshes)


def test_the_shared_expert_multiplies_like_the_others():
    config = settings(num_shared_experts=1)
    config.parallel.expert_gemm = "loop"
    with torch.device("meta"):
        model = GptOss(config.model)
    place_experts(
        model, config.train.precision, config.parallel, build_meshes(plan_layout(config.parallel, 4, 2), "cpu")
    )
    for layer in model.model.layers:
        assert layer.mlp.experts.backend == layer.mlp.shared_expert.backend == "loop"


@pytest.mark.parametrize("on_cuda, variable", [(False, "CXX"), (True, "CC")])
def test_compiling_without_a_compiler_is_refused_before_the_first_step(monkeypatch, on_cuda, variable):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f"train.compile=True needs a compiler.*name it in {variable}"):
        check_compiler(on_cuda)
    monkeypatch.setenv(variable, "no-such-compiler -x")
    with pytest.raises(ValueError, match="there is no no-such-compiler"):
        check_compiler(on_cuda)
    monkeypatch.setenv(variable, "/bin/sh -x")
    check_compiler(on_cuda)
