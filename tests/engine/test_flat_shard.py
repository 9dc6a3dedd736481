"""Runs of elements, as ZeRO shards them, through torch DCP: any run of any shape, on any number of ranks."""

import math

import pytest
import torch

from gptoss_dist.checkpoint import load_state, save
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.engine.flat_shard import boxes, flat_shard


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (3, 1, 4), (2, 2, 2, 3)])
def test_boxes_tile_every_run(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    flat = whole.flatten()
    for start_at in range(len(flat) + 1):
        for end in range(start_at, len(flat) + 1):
            parts = boxes(flat[start_at:end], start_at, shape)
            assert len(parts) <= max(2 * len(shape) - 1, 1)
            covered = torch.zeros(shape, dtype=torch.int64)
            for offset, values in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
                assert torch.equal(whole[place], values)
                covered[place] += 1
            assert covered.flatten()[start_at:end].all() and covered.sum() == end - start_at


def test_a_shard_of_rows_of_a_larger_tensor():
    """Two of six experts begin at expert 4; a run of their elements that begins in the middle of the second."""
    run = torch.arange(5.0)
    shard = flat_shard(run, 15, (2, 2, 5), whole=(6, 2, 5), first=4)
    assert shard.shape == (6, 2, 5)
    assert [(offset, values.tolist()) for offset, values in shard.boxes] == [((5, 1, 0), [[run.tolist()]])]
    with pytest.raises(TypeError, match="holds only a part"):
        shard.clone()


def test_written_as_runs_and_read_as_others(tmp_path):
    init_distributed()
    try:
        shapes = {"a": (5, 3, 2), "b": (7,), "c": (4, 4)}
        whole = {name: torch.randn(shape) for name, shape in shapes.items()}

        def shards(tensors, cut):
            """Every element, in two runs per tensor."""
            state = {}
            for name, tensor in tensors.items():
                flat = tensor.view(-1)
                shard = flat_shard(flat[:cut], 0, tensor.shape)
                shard.boxes += boxes(flat[cut:], cut, tuple(tensor.shape))
                state[name] = shard
            return state

        save(tmp_path, 1, shards(whole, 5), {})
        found = {name: torch.zeros(shape) for name, shape in shapes.items()}
        load_state(tmp_path / "step_00000001", shards(found, 3))
        assert all(torch.equal(found[name], whole[name]) for name in shapes)
        plain = {name: torch.zeros(shape) for name, shape in shapes.items()}
        load_state(tmp_path / "step_00000001", plain)
        assert all(torch.equal(plain[name], whole[name]) for name in shapes)
    finally:
        torch.distributed.destroy_process_group()
