"""Names that other people's code imports: all of them load, and their former names are the same things."""

from importlib import import_module
from typing import get_args

import pytest


@pytest.mark.parametrize(
    "package",
    [
        "gptoss_dist",
        "gptoss_dist.checkpoint",
        "gptoss_dist.config",
        "gptoss_dist.engine",
        "data_pipeline",
        "data_pipeline.prepare",
        "data_pipeline.command_line",
    ],
)
def test_all_public_names_load(package):
    module = import_module(package)
    assert len(module.__all__) > 0 and not [name for name in module.__all__ if getattr(module, name) is None]
    with pytest.raises(AttributeError):
        _ = module.there_is_no_such_name


def test_former_names():
    import data_pipeline
    from data_pipeline import WeightedDataset
    from data_pipeline.prepare import prepare
    from data_pipeline.prepare.pipeline import prepare as same
    from gptoss_dist.checkpoint import Keep, Retention

    assert Keep is Retention and data_pipeline.Source is WeightedDataset and prepare is same


def test_choices_are_those_of_the_tables():
    from data_pipeline.batches import Packing
    from data_pipeline.batches.documents import PACKINGS

    assert get_args(Packing) == tuple(PACKINGS)
