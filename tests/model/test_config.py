import dataclasses
from pathlib import Path

import pytest
import torch

from gptoss_dist import GptOss, ModelConfig
from gptoss_dist.model.config import SHAPING
from gptoss_dist.planner.parameters import count_parameters
from tests.support.reference import SIZES

CONFIGS = Path(__file__).parents[2] / "configs" / "model"

# (total, active by the model card's convention)
PUBLISHED = {
    "gptoss_20b": (20_914_757_184, 3_608_307_264),
    "gptoss_120b": (116_829_156_672, 5_132_849_472),
    "gptoss_502m": (501_836_640, 247_032_672),
    "gptoss_500m_true": (502_288_332, 247_207_884),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    count = count_parameters(ModelConfig.from_yaml(CONFIGS / f"{name}.yaml"))
    assert (count.total, count.active) == PUBLISHED[name]


def test_smaller_configs():
    assert round(count_parameters(ModelConfig.from_yaml(CONFIGS / "gptoss_73m.yaml")).total / 1e6, 1) == 73.4
    assert round(count_parameters(ModelConfig.from_yaml(CONFIGS / "gptoss_2b9.yaml")).total / 1e9, 1) == 2.9


def test_the_settings_that_shape_the_parameters():
    """For each setting: it is in SHAPING if and only if another value makes another state dict."""
    sizes = SIZES | {"vocab_size": 32, "layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
    others = {
        "num_hidden_layers": 5,
        "rope_scaling": None,
        "expert_activation": "silu",
        "num_shared_experts": 1,
        "sink_init": "zero",
        "sink_clamp": [-1.0, 1.0],
        "rope_pruned_fraction": 0.5,
        "layer_types": ["sliding_attention"] * SIZES["num_hidden_layers"],
    }

    def shapes(**changed):
        with torch.device("meta"):
            model = GptOss(ModelConfig(**sizes | changed))
        # A tied head is no parameter of its own, and the bias for the selection is a buffer.
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | {
            name: tuple(buffer.shape) for name, buffer in model.state_dict().items() if "selection" in name
        }

    before, shaping = shapes(), []
    for field in dataclasses.fields(ModelConfig):
        value = getattr(ModelConfig(**sizes), field.name)
        if field.name in others:
            other = others[field.name]
        else:
            other = not value if isinstance(value, bool) else 2 * value
        assert other != value, field.name
        changed = {field.name: other} | ({"layer_types": None} if field.name == "num_hidden_layers" else {})
        if shapes(**changed) != before:
            shaping.append(field.name)
    assert sorted(shaping) == sorted(SHAPING)


def test_dict_round_trip():
    config = ModelConfig.from_yaml(CONFIGS / "gptoss_502m.yaml")
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict(dataclasses.asdict(ModelConfig(rope_scaling=None))).rope_scaling is None
    with pytest.raises(ValueError, match="hidden_sizes"):
        ModelConfig.from_dict({"hidden_sizes": 1})


@pytest.mark.parametrize(
    "fields, key",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["local"]}, "layer_types"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"sink_clamp": [3.0, 1.0]}, "sink_clamp"),
    ],
)
def test_impossible_architectures_are_refused(fields, key):
    with pytest.raises(ValueError, match=key):
        ModelConfig(**fields)


def test_yaml_mistakes_name_the_key(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("hidden_sizzle: 3\n")
    with pytest.raises(ValueError, match="hidden_sizzle"):
        ModelConfig.from_yaml(path)
    path.write_text("hidden_size: wide\n")
    with pytest.raises(ValueError, match="hidden_size"):
        ModelConfig.from_yaml(path)
    with pytest.raises(ValueError, match="nowhere"):
        ModelConfig.from_yaml(tmp_path / "nowhere.yaml")
