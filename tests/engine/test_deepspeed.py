"""The DeepSpeed engine in one process; its layouts are in test_layouts.py, its launcher in tests/launch."""

import pytest
import torch
import torch.distributed as dist

from gptoss_dist.checkpoint import load_state, save
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.engine.deepspeed import DeepSpeedEngine
from gptoss_dist.engine.fsdp import FsdpEngine
from gptoss_dist.parallel.mesh import local
from tests.support.reference import LR, build, micro_batches, settings


@pytest.fixture(scope="module")
def ranks():
    yield init_distributed()
    dist.destroy_process_group()


def zero(stage: int, **model):
    """Settings of a stage; small parameters are sharded too, where DeepSpeed would keep them whole."""
    config = settings(**model)
    config.engine.kind, config.engine.zero_stage, config.train.gradient_accumulation = "deepspeed", stage, 2
    config.engine.deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return config


def values(engine) -> dict[str, torch.Tensor]:
    """A copy of the engine's state; in one process a shard is a run of everything."""
    copies = {}
    for name, tensor in engine.state().items():
        if hasattr(tensor, "boxes"):
            copies[name] = torch.cat([part.flatten() for _, part in tensor.boxes]).view(tensor.shape).clone()
        else:
            copies[name] = local(tensor.detach()).clone()
    return copies


@pytest.mark.heavy
@pytest.mark.parametrize(
    "stage, variant", [(1, ""), (2, ""), (3, ""), (1, "bf16"), (2, "offloaded"), (3, "persistent")]
)
def test_a_non_finite_step_leaves_no_trace(ranks, stage, variant):
    config = zero(stage)
    if variant == "bf16":
        config.train.precision = "bf16"
    elif variant:
        to_host = {"offload_optimizer": {"device": "cpu"}}
        config.engine.deepspeed = {"zero_optimization": to_host if variant == "offloaded" else {}}
    engine = build(config, ranks)
    assert isinstance(engine, DeepSpeedEngine)
    sums = engine.forward_backward(micro_batches(0, 2))
    assert float(engine.update(sums, LR).skipped) == 0
    good = values(engine)

    def unchanged() -> bool:
        return all(torch.equal(good[name], tensor) for name, tensor in values(engine).items())

    # A gradient that is not finite.
    state = engine.state()
    ((_, weight),) = state["model.model.norm.weight"].boxes
    kept = weight[3].item()
    weight[3] = torch.inf
    engine.load(state)
    sums = engine.forward_backward(micro_batches(1, 2))
    assert float(engine.update(sums, LR).skipped) == 1
    weight[3] = kept
    engine.load(state)
    assert unchanged()
    # A loss that is not finite although the gradients are.
    sums = engine.forward_backward(micro_batches(1, 2))
    sums = sums._replace(loss=sums.loss + torch.inf)
    assert float(engine.update(sums, LR).skipped) == 1
    assert unchanged()
    sums = engine.forward_backward(micro_batches(1, 2))
    result = engine.update(sums, LR)
    assert float(result.skipped) == 0 and torch.isfinite(result.grad_norm)
    assert not unchanged()


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_has_the_names_and_shapes_of_the_other_engine(ranks, stage, tmp_path):
    """And a checkpoint of one is a checkpoint of the other, weights in bf16 or not."""
    config = zero(stage, tie_word_embeddings=True, router_selection_bias=True)
    config.train.precision, config.loss.selection_bias_rate = "bf16", 0.01
    engine = build(config, ranks)
    for step in range(2):
        sums = engine.forward_backward(micro_batches(step, 2))
        engine.update(sums, LR)
    expected = values(engine)
    save(tmp_path, 2, engine.state(), {})
    config.engine.kind = "fsdp"
    other = build(config, ranks)
    assert isinstance(other, FsdpEngine)
    state = other.state()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in engine.state().items()}
    assert all(tensor.dtype == torch.float32 for tensor in engine.state().values())
    load_state(tmp_path / "step_00000002", state)
    other.load(state)
    found = values(other)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["optim.step"] == 2 and found["model.model.layers.0.mlp.router.selection_bias"].any()
    losses = []
    for each in (engine, other):
        sums = each.forward_backward(micro_batches(2, 2))
        losses.append(float(each.update(sums, LR).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # bf16 is rounded at other places


def test_zero_3_never_holds_the_whole_model(ranks, monkeypatch):
    from deepspeed import zero as library

    whole, convert = [], library.Init._convert_to_zero_parameters

    def recorded(self, parameters):
        whole.append(sum(p.numel() for p in parameters))
        convert(self, parameters)
        assert all(p.numel() == 0 for p in parameters)  # taken apart before the next one exists

    monkeypatch.setattr(library.Init, "_convert_to_zero_parameters", recorded)
    engine = build(zero(3), ranks)
    assert sum(whole) == sum(p.ds_numel for p in engine.model.parameters()) and len(whole) > 40
    assert all(p.numel() == 0 for p in engine.model.parameters())
    engine.evaluate(micro_batches(0, 2))
    assert all(p.numel() == 0 for p in engine.model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_itself_refuses_is_one_line(ranks, stage):
    config = zero(stage)
    config.engine.deepspeed = {"zero_optimization": {"overlap_com": True}}
    with pytest.raises(ValueError, match=r"engine.deepspeed: DeepSpeed refuses it: .*overlap_com") as refusal:
        build(config, ranks)
    assert "\n" not in str(refusal.value)
