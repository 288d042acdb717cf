"""A part of what `make fuzz` runs."""

from __future__ import annotations

import pytest

from tfops_testing import fuzz_cases, fuzz_ops


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_random_calls_give_what_the_oracle_says_or_one_error(first):
    counts = fuzz_ops.run_cases(seed=0, numbers=range(first, first + 500))
    # Fuzzing that compared nothing, or refused nothing, would have shown nothing.
    for run in ("eager", "imported"):
        assert counts[f"{run}: refused"]
    assert counts["eager: compared"] > 200


def test_cases_follow_from_seed_and_number():
    """A case that is reported can be run again."""
    for number in range(20):
        assert str(fuzz_cases.draw(3, number)) == str(fuzz_cases.draw(3, number))


def test_a_wrong_result_is_seen(monkeypatch):
    def off(call, rng):
        outputs = eager(call, rng)
        outputs[0] = outputs[0] * outputs[0].dtype.type(1.05)
        return outputs

    eager = fuzz_ops.eager
    monkeypatch.setattr(fuzz_ops, "eager", off)
    with pytest.raises(AssertionError, match=r"case \d+ of seed 0, "):
        fuzz_ops.run_cases(seed=0, numbers=range(40))


def test_an_error_that_names_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(fuzz_cases, "find_faults", lambda call: ["something else"])
    with pytest.raises(AssertionError, match=r"accepted|does not name what is wrong"):
        fuzz_ops.run_cases(seed=0, numbers=range(40))
