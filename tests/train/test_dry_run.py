"""What a dry run proposes where a run does not fit: the first of its changes that does, by whatever arithmetic."""

import psutil
import pytest

from gptoss_dist.config import Config, ModelConfig
from gptoss_dist.config.data import DataConfig
from gptoss_dist.train.dry_run import describe
from tests.support.ranks import MODEL

pytestmark = pytest.mark.heavy


@pytest.fixture
def config(tmp_path) -> Config:
    config = Config(model=ModelConfig(**MODEL), data=DataConfig(path=str(tmp_path / "none"), seq_len=64))
    config.train.precision, config.train.gradient_accumulation = "fp32", 2
    return config


def refusal(config: Config, monkeypatch, memory: float) -> str | None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": memory}))
    return describe(config, 1)[1]


@pytest.mark.slow
def test_the_largest_micro_batch_that_divides_the_given_one(config, monkeypatch):
    """Also where it is odd, which halving alone would never divide."""
    config.train.micro_batch_size = size = 3 * 5**3
    said = refusal(config, monkeypatch, 0.02 * 2**30)
    words = said.partition("; ")[2].split()
    found, accumulation = int(words[1]), int(words[3])
    assert 1 < found < size and size % found == 0 and found * accumulation == 2 * size and words[5] == "1", said
    config.train.micro_batch_size, config.train.gradient_accumulation = found, accumulation
    config.train.activation_checkpointing = 1
    assert refusal(config, monkeypatch, 0.02 * 2**30) is None
    config.train.micro_batch_size = next(n for n in range(found + 1, size + 1) if size % n == 0)
    assert refusal(config, monkeypatch, 0.02 * 2**30) is not None


def test_checkpointing_alone_if_that_is_enough(config, monkeypatch):
    config.train.micro_batch_size = 64
    config.model = ModelConfig(**MODEL | {"num_hidden_layers": 6})
    assert refusal(config, monkeypatch, 2**40) is None
    said = refusal(config, monkeypatch, 0.04 * 2**30)
    assert "; --train.activation_checkpointing 1 would fit (" in said, said


def test_nothing_fits(config, monkeypatch):
    config.train.micro_batch_size = 2
    said = refusal(config, monkeypatch, 100_000)
    assert "no micro-batch fits" in said and "\n" not in said
