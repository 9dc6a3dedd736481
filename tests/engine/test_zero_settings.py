"""What DeepSpeed is started with, and what is refused before it is."""

import json

import pytest

from gptoss_dist.config import load_config
from gptoss_dist.engine import EngineSettings, engine_kind
from gptoss_dist.engine.zero_settings import check_frozen, check_layout, check_offload, deepspeed_settings, zero_stage
from gptoss_dist.parallel.mesh import DeviceLayout
from gptoss_dist.train.start import engine_settings
from tests.support.reference import settings

ONE, SPREAD = DeviceLayout(1, 4, 1), DeviceLayout(1, 4, 2)


def config(deepspeed=None, stage=None, **train) -> EngineSettings:
    values = engine_settings(settings())
    values.engine.kind, values.engine.zero_stage, values.engine.deepspeed = "deepspeed", stage, deepspeed
    for name, value in train.items():
        setattr(values.train, name, value)
    return values


def test_ours_are_filled_in():
    found = deepspeed_settings(config(gradient_accumulation=3, micro_batch_size=2, precision="bf16"), ONE)
    assert found["train_batch_size"] == 2 * 3 * 4 and found["gradient_accumulation_steps"] == 3
    assert found["zero_optimization"] == {"stage": 2, "compute_grad_norm": True, "reduce_bucket_size": 2**25}
    assert found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["gradient_clipping"] == 1.0 and found["communication_data_type"] == "fp32"


def test_further_ones_are_handed_on():
    given = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 5},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "comms_logger": {"enabled": True},
    }
    before = json.dumps(given)
    found = deepspeed_settings(config(given), ONE)
    assert found["zero_optimization"]["overlap_comm"] and found["zero_optimization"]["stage"] == 3
    assert found["train_batch_size"] == 32 and found["comms_logger"] == {"enabled": True}
    assert json.dumps(given) == before
    assert zero_stage(config({"zero_optimization": {"stage": "auto"}}).engine) == 2


@pytest.mark.parametrize(
    "deepspeed, message",
    [
        ({"train_batch_size": 7}, r"train_batch_size=7 contradicts train.micro_batch_size x .* which gives 32"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping=0.5 contradicts optim.clip_norm, which gives 1.0"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=True contradicts train.precision"),
        ({"communication_data_type": "bf16"}, r"communication_data_type='bf16' contradicts"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer=.* has no place here: set optim"),
        ({"scheduler": {"type": "WarmupLR"}}, r"set optim.schedule"),
        ({"fp16": {"enabled": True}}, r"set train.precision"),
        ({"gradient_predivide_factor": 2}, r"gradient_predivide_factor=2 has no place"),
        ({"zero_optimisation": {"stage": 2}}, r"zero_optimisation=.* is not a setting of DeepSpeed"),
        ({"zero_optimization": {"mics_shard_size": 2}}, r"zero_optimization.mics_shard_size=2 .* parallel.replicate"),
        ({"zero_optimization": {"round_robin_gradients": True}}, r"round_robin_gradients=True has no place here"),
        ({"zero_optimization": []}, r"zero_optimization=\[\] must be an object"),
        ({"zero_optimization": "x"}, r"zero_optimization='x' must be an object"),
        ({"bf16": True}, r"bf16=True must be an object"),
        ({"bf16": {"bf16_optimizer_states": True}}, r"bf16.bf16_optimizer_states=True has no place here"),
        ({"data_types": {"buffer_dtype": "bf16"}}, r"data_types.buffer_dtype='bf16' has no place here"),
    ],
)
def test_contradictions_are_refused_by_name(deepspeed, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_settings(config(deepspeed), ONE)


OF_TRANSFORMERS = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""An ordinary file for transformers' Trainer."""


def test_a_file_for_transformers_is_refused_once():
    with pytest.raises(ValueError) as error:
        deepspeed_settings(
            config(OF_TRANSFORMERS | {"gradient_clipping": 0.5, "typo": 1, "amp": {"enabled": True}}), ONE
        )
    said = str(error.value)
    assert said.startswith("engine.deepspeed: ") and "\n" not in said and len(said) < 800
    for part in (
        "optimizer={",
        "set optim.*",
        "scheduler={",
        "set optim.schedule",
        "gradient_clipping=0.5 contradicts",
        "typo=1 is not a setting",
        "amp={'enabled': True} has no place",
    ):
        assert part in said
    assert "fp16=" not in said and "bf16=" not in said


@pytest.mark.parametrize(
    "nothing",
    [
        {"fp16": {"enabled": "auto", "loss_scale": 0}},
        {"fp16": {"enabled": False}, "amp": {"enabled": False, "opt_level": "O1"}, "elasticity": {}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1.0, "sparse_gradients": False, "optimizer": None},
        {"torch_autocast": {"enabled": False}, "zero_optimization": {"round_robin_gradients": "auto"}},
    ],
)
def test_sections_that_ask_for_nothing_are_accepted(nothing):
    found = deepspeed_settings(config(nothing), ONE)
    assert found == deepspeed_settings(config(), ONE)


def test_gaps_that_stay_are_deepspeeds_defaults():
    given = {key: value for key, value in OF_TRANSFORMERS.items() if key not in ("optimizer", "scheduler")}
    found = deepspeed_settings(config(given), ONE)
    assert "auto" not in json.dumps(found) and found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_stages():
    with pytest.raises(ValueError, match=r"engine.zero_stage=0 is not possible; choose 1, 2 or 3 \(0 shards nothing"):
        zero_stage(config(stage=0).engine)
    for stage in (4, "2", True):
        with pytest.raises(ValueError, match=rf"engine.deepspeed: zero_optimization.stage={stage!r} is not possible"):
            zero_stage(config({"zero_optimization": {"stage": stage}}).engine)
    with pytest.raises(ValueError, match=r"zero_optimization.stage=3 contradicts engine.zero_stage, which gives 2"):
        deepspeed_settings(config({"zero_optimization": {"stage": 3}}, stage=2), ONE)


def test_what_cannot_be_combined_with_spread_experts():
    config_file = {"engine.deepspeed": "configs/deepspeed/zeropp.json"}
    zeropp = engine_settings(load_config("configs/quickstart.yaml", overrides=config_file))
    assert deepspeed_settings(zeropp, ONE)["zero_optimization"]["zero_hpz_partition_size"] == 8
    with pytest.raises(ValueError, match=r"zero_quantized_gradients=True is not possible with parallel.expert_par"):
        deepspeed_settings(zeropp, SPREAD)
    for name, value in (("replicate", 2), ("reshard_after_forward", False)):
        other = config()
        setattr(other.parallel, name, value)
        with pytest.raises(ValueError, match=f"parallel.{name}={str(value).lower()} is not possible with engine.kind"):
            check_layout(other.parallel)


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload", "zero3_nvme", "zeropp"])
def test_ready_made_files(name):
    """Each fits every precision, and its contents are saved with the run instead of its name."""
    path = f"configs/deepspeed/{name}.json"
    for precision in ("fp32", "bf16"):
        found = load_config(
            "configs/quickstart.yaml", overrides={"engine.deepspeed": path, "train.precision": precision}
        )
        assert found.engine.deepspeed["zero_optimization"]["stage"] == zero_stage(found.engine)
        check_offload(deepspeed_settings(engine_settings(found), ONE), 1000, ONE)


def test_unreadable_file(tmp_path):
    path = tmp_path / "broken.json"
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"engine.deepspeed.*{path}"):
            load_config("configs/quickstart.yaml", overrides={"engine.deepspeed": str(path)})
    with pytest.raises(ValueError, match=r"engine.deepspeed=nowhere.json cannot be read: No such file"):
        load_config("configs/quickstart.yaml", overrides={"engine.deepspeed": "nowhere.json"})


def test_offload_needs_memory():
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}

    def check(stage, zero, parameters=10**13):
        check_offload(deepspeed_settings(config({"zero_optimization": zero}, stage=stage), SPREAD), parameters, SPREAD)

    with pytest.raises(ValueError, match=r"needs 186264.5 GiB on each machine \(20 bytes for each of 10,000,000"):
        check(3, both)
    with pytest.raises(ValueError, match=r"offload_param is not possible with engine.zero_stage=2; choose 3"):
        check(2, both, parameters=10)
    with pytest.raises(ValueError, match=r"offload_optimizer.device=nvme is not possible"):
        check(3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, parameters=10)
    with pytest.raises(ValueError, match=r"offload_optimizer=\"cpu\" must be .object"):
        check(2, {"offload_optimizer": "cpu"}, parameters=10)
    with pytest.raises(ValueError, match=r"offload_optimizer.ratio=0.5 is not possible"):
        check(3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, parameters=10)
    check(3, {})


def test_the_engine_follows_settings_then_launcher(monkeypatch):
    values = settings()
    for name in ("CROSS_RANK", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert engine_kind(values.engine) == "fsdp"
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert engine_kind(values.engine) == "deepspeed"
    monkeypatch.delenv("CROSS_RANK")
    values.engine.zero_stage = 3
    assert engine_kind(values.engine) == "deepspeed"
    values.engine.kind = "fsdp"
    assert engine_kind(values.engine) == "fsdp"


def test_frozen_parameters_where_nobody_can_write_them_are_refused():
    for zero in ({"offload_param": {"device": "nvme"}}, {"zero_quantized_nontrainable_weights": True}):
        check_frozen({"zero_optimization": zero}, [])
        with pytest.raises(ValueError, match=next(iter(zero))):
            check_frozen({"zero_optimization": zero}, ["*.router.*"])


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 2**25), ({"reduce_bucket_size": "auto"}, 2**25), ({"reduce_bucket_size": 1000}, 1000)]
)
def test_buckets_are_smaller_than_deepspeeds_unless_said_otherwise(given, expected):
    assert (
        deepspeed_settings(config({"zero_optimization": given}), ONE)["zero_optimization"]["reduce_bucket_size"]
        == expected
    )
