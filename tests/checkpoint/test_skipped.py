"""`skipped_samples.json`: what a run never reads again, and which checkpoints it has left."""

import json

import pytest
import torch
import torch.distributed as dist

from gptoss_dist import checkpoint
from gptoss_dist.checkpoint.skipped import FILE, merge_skipped, read_skipped, was_left, write_skipped

FIRST = {"first": 6, "end": 9, "order": "ab", "step": 5, "rewound_to": 3, "reason": "the loss rose"}
SECOND = FIRST | {"first": 20, "end": 24, "step": 9, "rewound_to": 7}


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_written_is_read_and_nothing_else_is_believed(tmp_path):
    write_skipped(tmp_path, [])
    assert read_skipped(tmp_path) == [] and not list(tmp_path.iterdir())
    write_skipped(tmp_path, [FIRST, SECOND])
    assert read_skipped(tmp_path) == [FIRST, SECOND] and [p.name for p in tmp_path.iterdir()] == [FILE]
    whole = (tmp_path / FILE).read_bytes()
    damages = [whole[:n] for n in (0, 1, len(whole) // 2, len(whole) - 1)]
    damages += [whole.replace(b'"end": 9', b'"end": 8'), b"[]", b"{}", b"null", b"\xff" * 40]
    for damage in damages:
        (tmp_path / FILE).write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{FILE}.*; (restore|save)") as error:
            read_skipped(tmp_path)
        assert "\n" not in str(error.value)
    write_skipped(tmp_path, [SECOND])  # a damaged one is replaced
    assert read_skipped(tmp_path) == [SECOND]
    write_skipped(tmp_path, [])  # a run that begins anew skips nothing, and keeps what was known
    assert read_skipped(tmp_path) == [] and json.loads((tmp_path / f"{FILE}.superseded").read_text())["skipped"]
    assert merge_skipped([FIRST], [FIRST, SECOND], [SECOND]) == [FIRST, SECOND]


def test_checkpoints_of_a_branch_that_was_left_are_passed_over(tmp_path, process_group):
    """Those of steps 3 and 5 of the first branch, of 5 after going back to 3, and of 9 after going back to 5 too."""

    def save(step, skipped):
        return checkpoint.save(tmp_path, step, {"model.a": torch.ones(2)}, {"data": {"skipped": skipped}})

    third, fifth = save(3, []), save(5, [])
    assert checkpoint.resolve(tmp_path) == fifth
    write_skipped(tmp_path, [FIRST])
    assert checkpoint.candidates(tmp_path) == [third] and checkpoint.resolve(tmp_path) == third
    assert checkpoint.resolve(fifth) == fifth, "one that is asked for by its own path"
    assert was_left(fifth, [FIRST]) and not was_left(third, [FIRST]) and not was_left(tmp_path / "none", [FIRST])
    fifth = save(5, [FIRST])
    assert checkpoint.resolve(tmp_path) == fifth
    again = FIRST | {"first": 30, "end": 31, "step": 8, "rewound_to": 5}
    write_skipped(tmp_path, [FIRST, again])
    save(9, [FIRST])
    assert checkpoint.resolve(tmp_path) == fifth
    ninth = save(9, [FIRST, again])
    assert checkpoint.resolve(tmp_path) == ninth
