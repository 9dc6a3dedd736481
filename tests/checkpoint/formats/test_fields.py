"""The table of fields is complete, and true of transformers."""

import dataclasses

import pytest

from gptoss_dist.checkpoint.formats.fields import CONVERTED, FIELDS, lost_fields, names
from gptoss_dist.model.config import ModelConfig


def test_the_table_holds_every_field():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(ModelConfig)]


def test_transformers_has_the_fields_that_the_table_says():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GptOssConfig()
    assert set(names("hf").values()) <= vars(theirs).keys() | theirs.attribute_map.keys()
    only_here = {field for field, (place, _) in FIELDS.items() if not isinstance(place, str) and place is not CONVERTED}
    assert not {field for field in only_here if hasattr(theirs, field)}


@pytest.mark.parametrize(
    "variant, hf, openai",
    [
        ({}, [], []),
        ({"initializer_range": 0.1, "sink_init": "zero", "max_position_embeddings": 64, "rope_theta": 1e4}, [], []),
        ({"swiglu_alpha": 1.0}, [], ["swiglu_alpha=1.0"]),
        ({"router_bias": False, "sink_clamp": [-1, 1]}, *[["router_bias=False", "sink_clamp=[-1, 1]"]] * 2),
    ],
)
def test_what_a_format_cannot_say_is_named(variant, hf, openai):
    assert (lost_fields(ModelConfig(**variant), "hf"), lost_fields(ModelConfig(**variant), "openai")) == (hf, openai)
