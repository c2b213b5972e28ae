"""Options with a rule each: all wrong ones at once, and nothing that only a typing error makes."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from earlysift.options import finite, one_of, option, problems, several, whole


@dataclasses.dataclass
class Options:
    share: float = option(0.5, lambda value: finite(value) and 0 < value < 1, "in (0, 1)", "It is a share.")
    mode: str = one_of("slow", "slow", "fast")
    name: str = "free"


def test_every_option_that_breaks_its_rule_gets_one_sentence_with_what_was_expected_and_what_came():
    found = problems(Options(share=2, mode="idle", name=None))
    assert found == {
        "share": "share must be in (0, 1), got 2. It is a share.",
        "mode": "mode must be slow or fast, got 'idle'.",
    }
    assert problems(Options()) == {}


def test_a_huge_value_makes_no_huge_sentence():
    assert len(problems(Options(mode="x" * 10_000))["mode"]) < 100


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_of_any_library_are_whole(value):
    assert whole(value, 3)
    assert not whole(value, 4)


@pytest.mark.parametrize("value", [True, 3.0, "3", None, [3], torch.tensor(3), 1 << 63, float("nan")])
def test_what_is_no_whole_number_is_refused(value):
    assert not whole(value, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, True),
        (0.5, True),
        (Fraction(1, 3), True),
        (np.float32(1), True),
        (True, False),
        (float("inf"), False),
        (float("nan"), False),
        (10**400, False),
        ("1", False),
        (1j, False),
    ],
)
def test_finite_numbers_are_numbers_that_can_be_counted_with(value, expected):
    assert finite(value) == expected


def test_several_values_are_a_list_with_something_sound_in_it():
    assert several([1, 2], lambda value: whole(value, 1))
    assert not any(several(values, lambda value: whole(value, 1)) for values in ([], 1, "12", {1: 2}, [0, 1], [1, "2"]))
