"""The data of a run: which settings are refused, and what becomes of a mixture on resume."""

import dataclasses
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from data_pipeline import Manifest
from data_pipeline.tokenizer.published import load_tokenizer
from gptoss_dist.checkpoint import CheckpointInfo, DataPlace
from gptoss_dist.checkpoint.info import FORMAT, sealed
from gptoss_dist.config import Config, SourceConfig, StageConfig, load_config, parse_arguments
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.train import data as data_module
from gptoss_dist.train.data import check_tokenizer, open_training_data, open_validation, verify
from gptoss_dist.train.dry_run import describe
from gptoss_dist.train.start import Start, check_resumable
from tests.support.ranks import run
from tests.support.sizes import SMALL
from tests.support.token_data import write_dataset

PER_STEP = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    generator, root = np.random.default_rng(5), tmp_path_factory.mktemp("data")
    for seed, (name, n) in enumerate({"web": 300, "code": 150, "math": 80}.items()):
        (root / name).mkdir()
        splits = {"train": generator.integers(2, 40, n)} | ({"validation": [30, 40]} if name != "math" else {})
        write_dataset(root / name, splits, seed=seed)
    return root


@pytest.fixture
def config(folders):
    def config(*sources, stages=(), steps=20, **data):
        config = Config(model=ModelConfig(**SMALL | {"vocab_size": 272}))
        config.train.steps, config.train.micro_batch_size = steps, PER_STEP
        for key, value in ({"seq_len": 16} | data).items():
            setattr(config.data, key, value)
        if len(sources) == 1 and isinstance(sources[0], str):
            config.data.path = str(folders / sources[0])
        else:
            config.data.path = None
            config.data.sources = [SourceConfig(str(folders / name), *rest) for name, *rest in sources]
        config.data.stages = [StageConfig(*stage) for stage in stages]
        config.check()
        return config

    return config


def resumed(step, samples, data) -> Start:
    """A start from the checkpoint CKPT, whose JSON keeps `data`."""
    place = DataPlace(**json.loads(json.dumps(dataclasses.asdict(data))))
    info = CheckpointInfo(step=step, samples_consumed=samples, config={}, data=place, tokens=0)
    return Start(Path("CKPT"), info, step, samples)


def indices(data, a, b):
    return data.mixture.order(np.arange(a, b)).tolist()


def test_a_run_goes_on_with_its_mixture(config):
    settings = config(("web", 0.7, 1.0), ("code", 0.3), stages=[(10, {"code": 1, "web": 1})])
    data = open_training_data(settings, PER_STEP)
    assert [position for position, _ in data.mixture.changes][:1] == [40]
    again = open_training_data(settings, PER_STEP, resumed(7, 28, data.place(28)))
    assert indices(again, 28, 200) == indices(data, 28, 200) and again.history == []
    # Another batch would move the stage.
    with pytest.raises(ValueError, match=r"CKPT was trained with other data: stages were .* from sample 40, now"):
        open_training_data(settings, 2 * PER_STEP, resumed(7, 28, data.place(28)))


def test_a_change_is_refused_unless_asked_for_and_then_recorded(config):
    first = open_training_data(config(("web", 0.7), ("code", 0.3)), PER_STEP)
    start = resumed(10, 40, first.place(40))
    changed = config(("code", 0.5), ("math", 0.5), stages=[(15, {"math": 1})])
    with pytest.raises(
        ValueError, match=r"web is gone; weight of code was 0\.3, now 0\.5; math is new; stages"
    ) as error:
        open_training_data(changed, PER_STEP, start)
    assert "--data.change_mixture true" in str(error.value) and "\n" not in str(error.value)
    changed.data.change_mixture = True
    second = open_training_data(changed, PER_STEP, start)
    assert second.history == [{"step": 10, "samples": 40, "changed": second.history[0]["changed"]}]
    assert second.mixture.start == 40 and [position for position, _ in second.mixture.changes] == [60]
    counts = {s.name: n for s, n in zip(second.mixture.sources, second.mixture.counts(40).tolist())}
    assert counts == {"code": first.mixture.counts(40)[1], "math": 0}
    # From now on it needs no permission, and goes on exactly; the change stays on record.
    changed.data.change_mixture = False
    third = open_training_data(changed, PER_STEP, resumed(12, 48, second.place(48)))
    assert indices(third, 48, 150) == indices(second, 48, 150) and third.history == second.history
    # The web comes back where it was left, forty samples later.
    back = config(("web", 1.0), ("math", 1.0), change_mixture=True)
    fourth = open_training_data(back, PER_STEP, resumed(17, 68, third.place(68)))
    assert fourth.mixture.counts(68)[0] == first.mixture.counts(40)[0] and len(fourth.history) == 2


def test_from_one_dataset_to_several_and_from_older_checkpoints(config, tmp_path):
    one = open_training_data(config("web"), PER_STEP)
    place = {"path": "x/web", "content_sha256": one.mixture.content_sha256}
    values = {"format": FORMAT, "step": 3, "samples_consumed": 12, "config": {"data": {"seq_len": 16}}, "data": place}
    (tmp_path / "checkpoint.json").write_text(sealed(values))
    old = Start(Path("CKPT"), CheckpointInfo.read(tmp_path), 3, 12)
    assert indices(open_training_data(config("web"), PER_STEP, old), 12, 99) == indices(one, 12, 99)
    for begin in (old, resumed(3, 12, one.place(12))):
        with pytest.raises(ValueError, match=r"weight of web was 1\.0, now 0\.5; code is new"):
            open_training_data(config(("web", 1.0), ("code", 1.0)), PER_STEP, begin)
        both = config(("web", 1.0), ("code", 1.0), change_mixture=True)
        mixture = open_training_data(both, PER_STEP, begin).mixture
        assert mixture.counts(12).tolist() == [12, 0]


def test_a_checkpoint_of_another_plan_of_the_samples_is_refused(config):
    """Best fit was planned otherwise once, which its checkpoints do not say."""
    for packing, earlier, message in (
        ("best_fit", None, "version 1 of data.packing=best_fit, this is version 2"),
        ("varlen", {"data.packing=varlen": 0}, "version 0 of data.packing=varlen, this is version 1"),
        ("contiguous", {"mixing": 2}, "version 2 of mixing, this is version 1"),
    ):
        settings = config("web", packing=packing)
        start = resumed(3, 12, open_training_data(settings, PER_STEP).place(12))
        open_training_data(settings, PER_STEP, start)
        start.info.data.versions.clear()
        start.info.data.versions.update(earlier or {})
        with pytest.raises(ValueError, match=f"CKPT was trained with {message}, which gives other samples"):
            open_training_data(settings, PER_STEP, start)


@pytest.mark.parametrize("model", [{"wings": 2}, {"rope_scaling": {"wings": 2}}])
def test_a_checkpoint_of_another_model_code_is_named(config, model):
    place = DataPlace(None, "0", {}, {})
    info = CheckpointInfo(3, 12, {"model": config("web").model.to_dict() | model}, place, tokens=0)
    with pytest.raises(
        ValueError,
        match=r"CKPT: checkpoint.json: config.model has unknown keys \['wings'\]; resume it with the version",
    ):
        check_resumable(config("web"), "CKPT", info)


def test_data_that_end_before_the_run(config):
    settings = config(("web", 1.0, 0.2), ("code", 1.0, 0.1), steps=1000)
    with pytest.raises(
        ValueError, match=r"train.steps=1000 needs 4,000 samples, but the data end after (\d+)"
    ) as error:
        open_training_data(settings, PER_STEP)
    settings.train.steps = int(str(error.value).split()[-1])
    data = open_training_data(settings, PER_STEP)
    assert settings.train.steps == data.mixture.positions_total // PER_STEP
    settings.train.steps += 1
    with pytest.raises(ValueError, match="the data end"):
        open_training_data(settings, PER_STEP)


def test_what_is_skipped_stays_so_in_its_own_order_alone(config):
    """Names of the sources and a resume change nothing; another mixture has other samples at these positions."""
    settings = config(("web", 0.7), ("code", 0.3), stages=[(15, {"code": 1})])
    first = open_training_data(settings, PER_STEP)
    entry = {"first": 44, "end": 52, "order": first.order_id, "step": 12, "rewound_to": 10, "reason": "the loss rose"}
    start = dataclasses.replace(resumed(10, 40, first.place(40)), skipped=(entry,))
    second = open_training_data(settings, PER_STEP, start)
    assert second.skipped_positions.ranges == [(44, 52)]
    assert second.place(48).skipped == [entry] and indices(second, 40, 99) == indices(first, 40, 99)
    # The stage begins at the sample where it was planned, two steps earlier.
    assert second.samples_between(40, 60) // PER_STEP == 3 and first.samples_between(40, 60) // PER_STEP == 5
    # The two settings name the sources otherwise, and list them in another order.
    renamed = config(("code", 0.3, None, "b"), ("web", 0.7, None, "a"), stages=[(15, {"b": 1})])
    assert open_training_data(renamed, PER_STEP, start).skipped_positions.ranges == [(44, 52)]
    other = open_training_data(config(("web", 1.0), ("code", 1.0), change_mixture=True), PER_STEP, start)
    assert other.skipped_positions.ranges == [] and other.skipped == (entry,)


def test_data_that_end_before_a_run_that_skips_some(config):
    settings = config(("web", 1.0, 0.2), ("code", 1.0, 0.1))
    data = open_training_data(settings, PER_STEP)
    end = data.mixture.positions_total
    entry = {"first": 44, "end": 52, "order": data.order_id, "step": 12, "rewound_to": 10, "reason": "the loss rose"}
    start = dataclasses.replace(resumed(10, 40, data.place(40)), skipped=(entry,))
    settings.train.steps = (end - 8) // PER_STEP
    open_training_data(settings, PER_STEP, start)
    for steps in ((end - 8) // PER_STEP + 1, end // PER_STEP):
        settings.train.steps = steps
        said = rf"the data end after {end:,}, of which 8 are skipped; .*--train.steps {(end - 8) // PER_STEP}$"
        with pytest.raises(ValueError, match=said):
            open_training_data(settings, PER_STEP, start)


def test_validation_and_dry_run_name_the_sources(config, folders):
    settings, said = config(("web", 0.7, 1.0), ("math", 0.3), packing="best_fit", steps=500), []
    assert list(open_validation(settings, said.append)) == ["web"] and "math has no validation split" in said[0]
    for names in (["math"], ["math", "math"]):
        without, said = config("web"), []
        without.data.path, without.data.sources = None, [SourceConfig(str(folders / name)) for name in names]
        with pytest.raises(ValueError, match=r"math: no validation split; train with --validation.every 0"):
            open_validation(without, said.append)
        assert not said
    text, refusal = describe(settings, world_size=1)
    assert refusal is None
    shares = ("from step 1: web 70.0", "from step 130: web is used up after 1 epochs; now math 100.00%")
    for expected in ("web: ", "math: ", "% padding", "% of documents cut", *shares):
        assert expected in text, text
    assert "NOT READY" in describe(config("math"), world_size=1)[0]


def test_sources_that_cannot_be_read_are_all_named(config, monkeypatch, tmp_path):
    """A start names the first and says how many more there are; a dry run names each, and what makes it."""
    settings = config(("web", 0.5), ("none", 0.3), ("data/mine", 0.2))
    settings.data.sources[2].path = "data/mine"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/data").mkdir(parents=True)
    (tmp_path / "configs/data/mine.yaml").write_text("sources: [pystdlib]\noutput: data/mine\n")
    with pytest.raises(ValueError, match=r"none: not a prepared dataset.*; 1 more of data.sources") as error:
        open_training_data(settings, PER_STEP)
    assert "\n" not in str(error.value)
    text = describe(settings, world_size=1)[0]
    assert text.count("NOT READY: ") == 2 and "NOT READY: data/mine: " in text
    assert "python -m data_pipeline.prepare --config configs/data/mine.yaml`" in text

    settings.model.vocab_size = 256  # web is there, and does not fit the model
    with pytest.raises(ValueError, match=r"web was made with a tokenizer of 265 ids.*; 2 more of data.sources"):
        open_training_data(settings, PER_STEP)
    text = describe(settings, world_size=1)[0]
    assert text.count("NOT READY: ") == 3 and "web was made with a tokenizer" in text
    settings.data.sources, settings.data.path = [], str(settings.data.sources[0].path)
    with pytest.raises(ValueError, match=r"smaller tokenizer$"):
        open_training_data(settings, PER_STEP)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "a", "sources": [SourceConfig("b")]}, "data.path=a and data.sources are both given"),
        ({"sources": [SourceConfig("x/b"), SourceConfig("y/b")]}, "data.sources=b is there twice"),
        ({"sources": [SourceConfig("a", 1.0), SourceConfig("b")]}, "give a weight to some only"),
        ({"sources": [SourceConfig("a", -1.0)]}, "data.sources: a weight=-1.0 must be 0 or more"),
        ({"sources": [SourceConfig("a", None, 0.0)]}, "data.sources: a max_epochs=0.0 must be positive"),
        ({"path": "a", "stages": [StageConfig(3, {"a": 1})]}, "data.stages=1 need two data.sources"),
        (
            {"sources": [SourceConfig("a"), SourceConfig("b")], "stages": [StageConfig(0, {"a": 1})]},
            "from_step=0 must be more than 0",
        ),
        (
            {"sources": [SourceConfig("a"), SourceConfig("b")], "stages": [StageConfig(5, {"c": 1})]},
            "weight of c=1 is for no source; there are a, b",
        ),
        ({"packing": "varlen", "document_mask": True}, "data.packing=varlen masks documents by itself"),
    ],
)
def test_contradictions_are_one_line(data, message):
    config = Config(model=ModelConfig())
    config.data.path = None
    for key, value in data.items():
        setattr(config.data, key, value)
    with pytest.raises(ValueError, match=message) as error:
        config.check()
    assert "\n" not in str(error.value)


@pytest.mark.heavy
@pytest.mark.parametrize("count", [1, 2, 3])
def test_later_lists_take_the_place_of_earlier_ones(tmp_path, count):
    """Whatever their lengths: no weight, limit or name of an earlier source stays."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    named = [SourceConfig("x/a", 0.5, 1.0, "one"), SourceConfig("x/b", 0.5, None, "two")]
    stages = [StageConfig(3, {"one": 1.0}), StageConfig(5, {"two": 1.0})]
    earlier = {"sources": [asdict(source) for source in named], "stages": [asdict(stage) for stage in stages]}
    first.write_text(yaml.safe_dump({"data": earlier}))
    assert load_config(first).data.sources == tuple(named) and load_config(first).data.stages == tuple(stages)
    later = [{"path": f"y/{n}"} for n in range(count)]
    second.write_text(yaml.safe_dump({"data": {"sources": later, "stages": []}}))
    for config in (
        load_config(first, second),
        load_config(first, overrides={"data.stages": "[]", "data.sources": json.dumps(later)}),
    ):
        assert config.data.sources == tuple(SourceConfig(f"y/{n}") for n in range(count)) and config.data.stages == ()
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(tmp_path / "saved.yaml").data == config.data


def test_a_later_path_takes_the_place_of_sources(tmp_path):
    """As any later option does; what is given side by side, or in a later file, is still a contradiction."""
    file = tmp_path / "sources.yaml"
    file.write_text(yaml.safe_dump({"data": {"sources": [{"path": "x/a"}, {"path": "x/b"}]}}))
    for given in (["--data.path", "mine"], ["--data.path=mine"]):
        data = parse_arguments(["--config", str(file), *given])[0].data
        assert data.path == "mine" and data.sources == ()
    assert len(parse_arguments(["--config", str(file), "--data.path", "null"])[0].data.sources) == 2
    for arguments in (
        ["--data.path", "mine", "--config", str(file)],
        ["--config", str(file), "--data.path", "mine", "--data.sources", "[{path: a}]"],
    ):
        with pytest.raises(ValueError, match=r"data\.path=mine and data.sources are both given"):
            parse_arguments(arguments)


def test_content_is_verified_as_asked(config, monkeypatch):
    calls = []

    def check(folder, manifest, *, part, parts, always):
        calls.append((folder, part, parts, always))

    said = []
    monkeypatch.setattr("gptoss_dist.train.data.check_content", check)
    monkeypatch.setattr("gptoss_dist.train.data.record_content", lambda folder, _: calls.append(("recorded", folder)))
    settings = config(("web", 1.0), ("code", 1.0))
    init_distributed()
    try:
        folders = [source.path for source in settings.data.sources]
        for kind, always in (("once", False), ("always", True)):
            settings.data.verify = kind
            verify(settings.data, said.append)
            assert calls == [(f, 0, 1, always) for f in folders] + [("recorded", f) for f in folders]
            calls.clear()
        settings.data.verify = "never"
        verify(settings.data, said.append)
        assert not calls
        tokens = sum(Manifest.read(f).tokens(split) for f in folders for split in ("train", "validation"))
        assert said == [f"comparing {tokens:,} tokens with their checksums (data.verify)"] * 2

        def damaged(folder, *_, **__):
            raise ValueError(f"{folder}/train-00000.bin: content differs")

        settings.data.verify = "once"
        monkeypatch.setattr("gptoss_dist.train.data.check_content", damaged)
        with pytest.raises(ValueError, match=r"web/train-00000\.bin: content differs"):
            verify(settings.data, said.append)
        assert not calls  # what was not found whole is not recorded as such
    finally:
        dist.destroy_process_group()


VERIFY_COPIES = """
import sys
import time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from data_pipeline.shards import checksums as content
from gptoss_dist.config import Config
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.distributed.collectives import long_timeout_group
from gptoss_dist.distributed.processes import shut_down, init_distributed
from gptoss_dist.train.data import verify

rank, config = init_distributed().rank, Config(model=ModelConfig(vocab_size=272))
patient = long_timeout_group()
scan, read = content.scan, []


def slow_scan(reader, eot_id):
    read.append(reader.file.path.stem)
    if (rank, case) == (0, "sound") and len(read) == 1:
        time.sleep(4)
    return scan(reader, eot_id)


content.scan = slow_scan
for case in sys.argv[2:]:
    config.data.path = f"{sys.argv[1]}/{case}/{rank}"
    read.clear()
    _set_pg_timeout(timedelta(seconds=2.5 if case == "sound" else 300))
    try:
        verify(config.data, print, patient)
        print(case, "sound", flush=True)
    except ValueError as error:
        print(case, error, flush=True)
    if case == "common":
        print("common-read", *read, flush=True)
shut_down()
"""


@pytest.mark.distributed
def test_every_copy_of_the_data_is_verified(tmp_path):
    """Two ranks with copies of their own, as on two machines: damage in either is seen by both, whatever the shard. Of
    files that both see each reads a part. A rank may take longer than collectives wait.
    """
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", {"train": [9] * 8, "validation": [9, 9]})
    files = sorted(path.name for path in (tmp_path / "data").glob("*.bin"))
    cases = {"sound": None, "other": None, "common": None}
    cases |= {f"{rank}-{name}": (rank, name) for rank in (0, 1) for name in files}
    for case, damage in cases.items():
        for rank in (0, 1):
            shutil.copytree(tmp_path / "data", tmp_path / case / str(rank))
        if damage is not None:
            path = tmp_path / case / str(damage[0]) / damage[1]
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    shutil.rmtree(tmp_path / "other" / "1")
    (tmp_path / "other" / "1").mkdir()
    write_dataset(tmp_path / "other" / "1", {"train": [8] * 9, "validation": [9, 9]})
    shutil.rmtree(tmp_path / "common" / "1")
    (tmp_path / "common" / "1").symlink_to("0")
    script = tmp_path / "verify_copies.py"
    script.write_text(VERIFY_COPIES)
    found = {}
    for line in run(str(script), str(tmp_path), *cases, processes=2).stdout.splitlines():
        case, text = line.split(maxsplit=1)
        found.setdefault(case, []).append(text)
    shares = found.pop("common-read")
    assert sorted(" ".join(shares).split()) == sorted(name.removesuffix(".bin") for name in files) and len(shares) == 2
    for case, damage in cases.items():
        assert len(found[case]) == 2 and (found[case][0] == found[case][1] or case == "other")
        if damage is not None:
            rank, name = damage
            assert f"{case}/{rank}/{name}: " in found[case][0]
    assert found["sound"][0] == "sound"
    assert all("is not the same dataset for all ranks" in text for text in found["other"])


def test_weights_of_another_tokenizer_are_refused_unless_that_is_meant(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(data_module, "print_message", told.append)
    config = load_config("configs/quickstart.yaml", overrides={"init.from": str(tmp_path)})
    ours = load_tokenizer("bytes")
    data = SimpleNamespace(training=SimpleNamespace(mixture=SimpleNamespace(tokenizer=ours)))
    weights = SimpleNamespace(folder=tmp_path)
    check_tokenizer(config, None, data)
    check_tokenizer(config, weights, data)
    assert len(told) == 1 and "has no tokenizer beside it" in told[0]
    ours.save(tmp_path)
    check_tokenizer(config, weights, data)
    load_tokenizer("builtin").save(tmp_path)
    with pytest.raises(ValueError, match=r"^init.from=.* tokenizer bytes .*builtin.*--init.other_tokenizer true"):
        check_tokenizer(config, weights, data)
    config.init["other_tokenizer"] = True
    check_tokenizer(config, weights, data)
    assert len(told) == 1
