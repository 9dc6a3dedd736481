"""Layouts whose steps are both traced and run, once for all tests of this folder."""

import dataclasses
import json

import pytest

from tests.support.foreseen import Foreseen
from tests.support.ranks import run

BF16 = {"train.precision": "bf16"}
BALANCED = {"train.routing": "balanced"}
ODD = {"vocab_size": 103, "hidden_size": 40}
"""Sizes that two and four processes do not share evenly."""
TIED = {"tie_word_embeddings": True}


def fsdp(**options) -> dict:
    """Options of FSDP2."""
    return BALANCED | {f"train.{name}": value for name, value in options.items()}


def zero(stage: int, persistence: int = 1000, **options) -> dict:
    """Options of a stage of ZeRO; stage 3 keeps parameters of up to `persistence` elements whole."""
    deepspeed = {"zero_optimization": {"reduce_bucket_size": 5000}}
    if stage == 3:
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = persistence
    engine = {"engine.kind": "deepspeed", "engine.zero_stage": stage, "engine.deepspeed": deepspeed}
    return engine | fsdp(**options)


CASES = [
    Foreseen("1x1", 1, options=fsdp(precision="bf16")),
    Foreseen("1x1 zero-2", 1, options=zero(2, precision="bf16")),
    Foreseen("1x1 zero-3", 1, options=zero(3, gradient_accumulation=2)),
    Foreseen("2x1 all copies", 2, replicate=2, options=fsdp(precision="bf16"), slow=True),
    Foreseen("2x2", 2, ep=2, model=ODD | {"router_selection_bias": True}, options=fsdp(precision="bf16")),
    Foreseen("2x1 zero-1", 2, model=ODD, options=zero(1), slow=True),
    Foreseen("2x2 zero-2", 2, ep=2, model=ODD, options=zero(2, gradient_accumulation=2)),
    Foreseen("2x1 zero-3 tied", 2, model=TIED, options=zero(3, gradient_accumulation=2)),
    Foreseen("4x1", 4, model=ODD, options=fsdp(precision="bf16", activation_checkpointing=1), every_rank=True),
    Foreseen("4x2 accumulating", 4, ep=2, options=fsdp(gradient_accumulation=2), slow=True),
    Foreseen(
        "4x2 HSDP", 4, ep=2, replicate=2, options=fsdp(activation_checkpointing=1, keep_all_to_all=True), slow=True
    ),
    Foreseen(
        "4x4 tied, partly frozen",
        4,
        ep=4,
        model=TIED,
        options=fsdp(activation_checkpointing=1) | {"optim.freeze": ["*.router.*", "*.q_proj.*"]},
        slow=True,
    ),
    Foreseen(
        "4x2 context 2",
        4,
        ep=2,
        cp=2,
        model={"num_hidden_layers": 2, "sliding_window": 3},
        options=fsdp(precision="bf16", activation_checkpointing=2),
        every_rank=True,
    ),
    Foreseen("4x2 learned", 4, ep=2, options=fsdp(routing="learned")),
    Foreseen("4x2 zero-1", 4, ep=2, options=zero(1, precision="bf16", gradient_accumulation=2)),
    Foreseen("4x4 zero-2", 4, ep=4, model=ODD, options=zero(2, precision="bf16"), every_rank=True, slow=True),
    Foreseen("4x2 zero-3", 4, ep=2, model=ODD, options=zero(3, precision="bf16", gradient_accumulation=2), slow=True),
]


def parameters(cases: list[Foreseen]) -> list:
    """Return cases for `pytest.mark.parametrize`."""
    return [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.slow else ()) for case in cases]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Return a function that traces and trains all cases like one in one launch, and gives those of that one."""
    folder, done = tmp_path_factory.mktemp("foreseen"), set()

    def of(case: Foreseen) -> list[dict]:
        if (like := (case.world, case.slow)) not in done:
            cases = [dataclasses.asdict(one_layer(other)) for other in CASES if (other.world, other.slow) == like]
            (folder / "cases.json").write_text(json.dumps(cases))
            script, arguments = "tests/support/foreseen.py", (str(folder / "cases.json"), str(folder))
            run(script, *arguments, processes=case.world, deepspeed=True)
            done.add(like)
        return [json.loads((folder / f"{case.name}.{rank}.json").read_text()) for rank in range(case.world)]

    return of


def one_layer(case: Foreseen) -> Foreseen:
    """Return a case with one block, which has all that a second would repeat."""
    return dataclasses.replace(case, model={"num_hidden_layers": 1} | case.model)
