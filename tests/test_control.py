"""What auto mode may choose from, and what it may spend."""

import pytest

from earlysift.control import Choice, Control, choices
from probing import CHEAP

NAN, INF = float("nan"), float("inf")


def test_everything_is_chosen_from():
    assert choices(Control(depths=(1, 3), keeps=(0.5,), rules=("greedy",))) == [
        Choice("greedy", 1, 0.5),
        Choice("greedy", 3, 0.5),
    ]
    assert len(set(choices(Control()))) == 12
    assert str(Choice("unbiased", 2, 0.67)) == "unbiased, depth 2, keep 0.67"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": ()}, r"depths must be positive, got \(\)\."),
        ({"depths": (0, 1)}, r"depths must be positive, got \(0, 1\)\."),
        ({"depths": (1.5,)}, r"depths must be positive, got \(1\.5,\)\. They are whole numbers of layers\."),
        ({"depths": (True,)}, "depths must"),
        ({"depths": 2}, "depths must"),
        ({"depths": "12"}, "depths must"),
        ({"keeps": ("0.5",)}, "keeps must"),
        ({"keeps": (NAN,)}, "keeps must"),
        ({"keeps": 0.5}, "keeps must"),
        ({"rules": "greedy"}, r"rules must be of greedy and unbiased, got 'greedy'\."),
        ({"rules": (["greedy"],)}, "rules must"),
        ({"total_steps": 0}, r"total_steps must be a whole number of at least 1 or None, got 0\."),
        ({"total_steps": -5}, "total_steps must"),
        ({"total_steps": 2.5}, "total_steps must"),
        ({"total_steps": "100"}, "total_steps must"),
        ({"probe_share": NAN}, "probe_share must"),
        ({"probe_share": "1%"}, "probe_share must"),
        ({"end_share": None}, "end_share must"),
        ({"end_share": NAN}, "end_share must"),
        ({"reference_costs": {**CHEAP, "probe": NAN}}, "reference_costs must be finite times, none negative"),
        ({"reference_costs": {**CHEAP, "probe": INF}}, "reference_costs must"),
        ({"reference_costs": {**CHEAP, "score_1": -1.0}}, "reference_costs must"),
        ({"reference_costs": {**CHEAP, "train": 0.0}}, "reference_costs must"),
        ({"reference_costs": {**CHEAP, "train": "1"}}, "reference_costs must"),
        ({"reference_costs": [1.0, 2.0]}, "reference_costs must"),
        ({"keeps": ()}, r"keeps must be in \(0, 1\), got \(\)\."),
        ({"keeps": (0.5, 1.0)}, r"keeps must be in \(0, 1\), got \(0\.5, 1\.0\)\."),
        ({"rules": ()}, r"rules must be of greedy and unbiased, got \(\)\."),
        ({"rules": ("greedy", "lazy")}, r"rules must be of greedy and unbiased, got \('greedy', 'lazy'\)\."),
        ({"probe_share": 0.0}, r"probe_share must be in \(0, 1\), got 0\.0\. The usual value is 0\.01\."),
        ({"probe_share": 1.0}, r"probe_share must be in \(0, 1\), got 1\.0\. The usual value is 0\.01\."),
        ({"end_share": 0.0}, r"end_share must be in \(0, 1\], got 0\.0\."),
        ({"end_share": 1.5}, r"end_share must be in \(0, 1\], got 1\.5\."),
    ],
)
def test_what_cannot_be_controlled_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Control(**options)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match=r"(?s)depths must.*\n.*keeps must.*\n.*probe_share must"):
        Control(depths=(0,), keeps=(2.0,), probe_share=2.0)
