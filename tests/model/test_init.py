import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.init import fill, initialize
from tests.support.sizes import SMALL

CONFIG = ModelConfig(**SMALL)


def test_any_part_of_a_parameter_is_drawn_alike():
    model = GptOss(CONFIG)
    initialize(model, seed=3)
    for name, whole in model.named_parameters():
        size = whole.shape[0]
        for start, stop in ((0, size // 2), (size // 2, size)):
            part = torch.full((stop - start, *whole.shape[1:]), torch.nan)
            fill(part, name, whole.shape, CONFIG, 3, (start,) + (0,) * (whole.ndim - 1))
            assert torch.equal(part, whole[start:stop]), name
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    part = torch.empty(2, 5, 7)
    fill(part, "model.layers.0.mlp.experts.gate_up_proj", experts.shape, CONFIG, 3, (3, 4, 2))
    assert torch.equal(part, experts[3:5, 4:9, 2:9])


def test_distribution_and_independence():
    model = GptOss(CONFIG)
    initialize(model, seed=0)
    values = dict(model.named_parameters())
    assert all((values[n] == 1).all() for n in values if n.endswith("norm.weight"))
    assert all((values[n] == 0).all() for n in values if "bias" in n and "router" not in n)
    drawn = torch.cat([p.flatten() for n, p in values.items() if p.ndim > 1 and "bias" not in n])
    assert abs(drawn.std() - CONFIG.initializer_range) < 0.02 * CONFIG.initializer_range
    assert abs(drawn.mean()) < 4 * CONFIG.initializer_range / len(drawn) ** 0.5
    # no two experts, layers or seeds share their weights
    experts = values["model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts, values["model.layers.1.mlp.experts.down_proj"])
    before = experts.clone()
    initialize(model, seed=1)
    assert not torch.equal(before, experts)
