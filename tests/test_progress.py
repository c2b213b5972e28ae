"""Progress: what a checkpoint holds comes back as it was, and places pools in their optimizer steps."""

import dataclasses
import json

import pytest

from earlysift import progress
from earlysift.control import Choice
from earlysift.controller import State
from earlysift.progress import COUNTS, Progress

STARTED = progress.start(None, None)
LATER = Progress(
    step=7,
    micro_step=1,
    pools_per_step=2,
    kept=8,
    largest=16,
    counts=dict.fromkeys(COUNTS, 3),
    fidelity={"gain": 1.25},
    weights_read=True,
    steering=State(Choice("greedy", 2, 0.5), ({"loss": 1.0},), 9, (1.0, 0.1)),
)


@pytest.mark.parametrize("before", [STARTED, LATER])
def test_progress_comes_back_from_json_as_it_was(before):
    saved = json.loads(json.dumps(progress.to_json(before)))
    assert progress.from_json(saved) == before
    assert set(saved) == {field.name for field in dataclasses.fields(Progress)}


def test_saved_progress_does_not_change_with_the_live_one():
    live = dataclasses.replace(LATER, counts=dict(LATER.counts))
    saved = progress.to_json(live)
    live.counts["trained"] += 1
    assert saved["counts"]["trained"] == LATER.counts["trained"]


def test_a_number_that_does_not_rise_begins_a_new_step():
    assert STARTED.place(0) == (0, True)
    assert [LATER.place(micro_step) for micro_step in (0, 1, 2, 5)] == [(7, True), (7, True), (6, False), (6, False)]
