"""What the recorder counts of real operators, against counts by hand."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gptoss_dist.planner.tracing.recorder import Operator, Recorder


def named(recorder: Recorder, name: str) -> list[Operator]:
    return [operator for operator in recorder.operators if operator.name.startswith(name)]


def test_products_have_two_flops_per_multiply_add():
    a, b, c = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    with Recorder() as recorder:
        torch.mm(a, b)
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
        torch.mm(a, b, out=c)
    assert [o.flops for o in recorder.operators if o.flops] == [120, 120, 120, 240, 120]
    plain, added, in_place, _, out = [o for o in recorder.operators if o.flops]
    assert (plain.read, plain.written) == ((12 + 20) * 4, 15 * 4)
    assert added.read == (15 + 12 + 20) * 4 and added.written == in_place.written == out.written == 15 * 4
    # In place and into `out`: the block that is written is one that was there.
    assert in_place.outputs == out.outputs and in_place.outputs[0] in in_place.inputs
    assert plain.outputs[0] not in plain.inputs


def test_grouped_products_forward_and_for_the_weights_gradient():
    x, w = (torch.ones(32, 16, dtype=torch.bfloat16), torch.ones(4, 16, 8, dtype=torch.bfloat16))
    offsets = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    x.requires_grad_(), w.requires_grad_()
    with Recorder() as recorder:
        out = torch._grouped_mm(x, w, offs=offsets)
        out.backward(torch.ones_like(out))
    # Each row meets one expert: forward, the rows' gradient and the weights' gradient are as large as each other.
    products = named(recorder, "aten._grouped_mm")
    assert [(o.phase, o.flops) for o in products] == [("forward", 8192), ("backward", 8192), ("backward", 8192)]


def test_views_are_no_operators_and_blocks_live_as_long_as_their_tensors():
    with Recorder() as recorder:
        a = torch.ones(100)
        recorder.operators.clear()
        a.view(10, 10).t()[2:].detach()
        assert not recorder.operators
        b = a + 1
        (number,) = recorder.operators[-1].outputs
        block = b.untyped_storage()
        block.resize_(0)
        block.resize_(800)
        c = a * 2
        del b, block
        c.add_(1)
    storage = recorder.storages[number]
    assert "resized" in storage.uses
    assert [nbytes for _, nbytes in storage.sizes] == [400, 0, 800, 0] and storage.last == 2
    kept = recorder.storages[recorder.operators[-1].outputs[0]]
    assert kept.last == float("inf") and kept.bytes_at(10) == 400


@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputation_belongs_to_the_backward_pass(recomputed):
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)

    def run(x):
        return layer(x).tanh()

    with Recorder() as recorder:
        out = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
        out.sum().backward()
        recorder.phase = "update"
        layer.weight.data.add_(layer.weight.grad)
    phases = [operator.phase for operator in named(recorder, "aten.addmm")]
    assert phases == ["forward", "backward"][: 1 + recomputed]
    assert named(recorder, "aten.add_")[-1].phase == "update"


def test_a_resize_is_followed_only_while_it_is_recorded():
    before = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), Recorder():
        assert torch.UntypedStorage.resize_ is not before
        raise ZeroDivisionError
    assert torch.UntypedStorage.resize_ is before
