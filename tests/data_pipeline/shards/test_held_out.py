"""The rule that divides documents: the same for one document and for many."""

import hashlib

import numpy as np
import pytest

from data_pipeline.shards.held_out import are_held_out, is_held_out, place_of, places_of


def test_one_and_many_agree_to_the_last_bit():
    digests = [hashlib.sha256(str(n).encode()).digest() for n in range(5000)]
    digests += [bytes(32), b"\xff" * 32, b"\x80" + bytes(31), b"\x7f" + b"\xff" * 31]
    high = np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)
    assert [place_of(digest) for digest in digests] == places_of(high).tolist()
    for fraction in (0.0, 0.01, 0.5, place_of(digests[7])):
        assert [is_held_out(digest, fraction) for digest in digests] == are_held_out(high, fraction).tolist()
    assert np.mean(are_held_out(high, 0.2)) == pytest.approx(0.2, abs=0.02)


def test_a_larger_fraction_holds_out_the_same_and_more():
    high = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    assert not np.any(are_held_out(high, 0.1) & ~are_held_out(high, 0.2))
