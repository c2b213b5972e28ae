"""The configuration: refused when it is made, plain numbers, and an identity that a checkpoint can hold."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from earlysift import SiftConfig, selectors, warmup
from earlysift.control import Control
from earlysift.measures import MEASURES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1.5}, "depth must be a whole number, got 1.5"),
        (
            {"chunk_rows": 0, "probe_every": -1},
            r"(?s)probe_every must be .*, got -1.*\n.*chunk_rows must be at least 1",
        ),
        ({"keep": float("nan"), "seed": "x"}, r"(?s)keep must be in .*, got nan.*\n.*seed must be a whole number"),
        ({"mode": "auto", "score": "exact"}, "Auto mode chooses among early exits"),
        ({"schedule": 0.5}, "schedule must be a callable"),
        ({"control": Control()}, "control was given, but mode='fixed' ignores it"),
        ({"dtype": torch.int8}, "dtype must be a torch.dtype of floating point"),
        ({"kept": 0}, "kept must be at least 1, got 0"),
        ({"explore": 1.0}, r"explore must be in \[0, 1\), or None, got 1.0"),
        ({"explore": -0.1}, "explore must be in"),
        (
            {"explore": 0.1, "select": selectors.proportional},
            "would lose the weights of select=proportional. Give explore=0",
        ),
        ({"keep_schedule": 0.5}, "keep_schedule must be a callable from steps to values of keep, or None, got 0.5"),
        ({"keep_schedule": warmup(5), "mode": "auto"}, "Auto mode chooses keep itself. Leave keep_schedule out"),
        ({"mode": "auto", "sample_id": "n", "explore": 0}, "Auto mode with sample_id needs samples that are drawn"),
        ({"score": "blend", "scope": "global"}, "score='blend' learns on each rank's own candidates"),
        ({"score": "probe", "mode": "auto"}, "Auto mode chooses among early exits"),
        ({"score": "blend", "mode": "auto"}, "Auto mode chooses among early exits"),
    ],
)
def test_a_config_that_cannot_work_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        SiftConfig(**options)


def test_numbers_of_other_libraries_become_plain_ones():
    config = SiftConfig(keep=np.float32(0.5), kept=np.int64(8), depth=np.int32(2), seed=np.uint8(3))
    assert [type(getattr(config, name)) for name in ("keep", "kept", "depth", "seed")] == [float, int, int, int]
    assert config == SiftConfig(keep=0.5, kept=8, depth=2, seed=3)


@pytest.mark.parametrize("score", [*MEASURES, "probe", "blend", "exact", "uniform", lambda model, pool: pool])
def test_the_identity_is_json_and_the_same_for_the_same_options_alone(score):
    options = {"keep": 0.25, "score": score, "schedule": warmup(5), "select": selectors.percentile}
    identity = SiftConfig(**options).identity()
    assert json.loads(json.dumps(identity)) == identity == SiftConfig(**options).identity()
    changes = {"keep": 0.5, "depth": 2, "schedule": warmup(50), "trim": True, "seed": 1, "reduction": "sum"}
    changes |= {"explore": 0.3, "keep_schedule": lambda step: 0.5}
    for name, value in changes.items():
        changed = dataclasses.replace(SiftConfig(**options), **{name: value}).identity()
        assert {key for key in identity if changed[key] != identity[key]} == {name}


def test_without_a_schedule_every_step_selects():
    assert [SiftConfig().share(step) for step in (0, 10**6)] == [1.0, 1.0]
    assert [SiftConfig(schedule=warmup(2)).share(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"schedule to return a number in \[0, 1\], got 'no' at step 3"):
        SiftConfig(schedule=lambda step: "no").share(3)


def test_a_tenth_is_drawn_where_something_learns_from_it_unless_another_share_is_given():
    assert [SiftConfig(score=score).explored for score in ("loss", "probe", "blend")] == [0.0, 0.0, 0.1]
    assert SiftConfig(mode="auto").explored == 0.1
    assert [SiftConfig(score="blend", explore=share).explored for share in (0, 0.5)] == [0.0, 0.5]


def test_without_a_schedule_of_its_own_keep_stays():
    assert [SiftConfig(keep=0.25).keep_at(step) for step in (0, 10**6)] == [0.25, 0.25]
    assert [SiftConfig(keep=0.25, keep_schedule=lambda step: 1 / (step + 1)).keep_at(step) for step in (0, 3)] == [
        1,
        0.25,
    ]
    with pytest.raises(ValueError, match=r"keep_schedule to return a number in \[0.25, 1\], got 0.2 at step 4"):
        SiftConfig(keep=0.25, keep_schedule=lambda step: 1 / (step + 1)).keep_at(4)
