"""Schema: dataclasses held against their annotations, all problems at once."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from earlysift import schema
from earlysift.schema import Above0, Count, InvalidSettings, Keep, Share


@dataclass(frozen=True, kw_only=True)
class Asked:
    batch: Count = 32
    keep: Keep = 0.5
    flipped: Share = 0.0
    budget: Above0 = 60.0
    rate: float = 0.1
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    layers: Annotated[int, Field(le=9)] = 6
    limit: Count | None = None
    task: Literal["one", "two"] = "one"
    device: Annotated[str, Field(pattern="^(cpu|cuda)$", description="cpu or cuda")] = "cpu"
    name: str = ""
    out: Path = Path("out")
    data: tuple[Path, ...] = ()
    depths: tuple[Count, ...] = ()
    resume: bool = False

    def __post_init__(self):
        schema.validate(self, (schema.POOL_FITS, (("batch", "layers"), self.odd_together)))

    @staticmethod
    def odd_together(asked):
        return "batch and layers are both odd." if asked.batch % 2 and asked.layers % 2 else ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch": "many"}, "batch must be a whole number, at least 1, got 'many'."),
        ({"batch": 0}, "batch must be at least 1, got 0."),
        ({"batch": True}, "batch must be a whole number, at least 1, got True."),
        ({"batch": 2.0}, "batch must be a whole number, at least 1, got 2.0."),
        ({"batch": "2"}, "batch must be a whole number, at least 1, got '2'."),
        ({"batch": None}, "batch must be a whole number, at least 1, got None."),
        ({"batch": [2]}, "batch must be a whole number, at least 1, got [2]."),
        ({"keep": 0}, "keep must be in (0, 1], got 0."),
        ({"flipped": 1.0}, "flipped must be in [0, 1), got 1.0."),
        ({"budget": -3}, "budget must be more than 0, got -3."),
        ({"budget": {}}, "budget must be a number, more than 0, got {}."),
        ({"budget": 10**400}, "budget must be"),
        ({"rate": float("nan")}, "rate is not a number (nan); give a finite number."),
        ({"keep": float("nan")}, "keep is not a number (nan); give a finite number, in (0, 1]."),
        ({"budget": float("inf")}, "budget is infinite (inf); give a finite number, more than 0."),
        ({"batch": float("-inf")}, "batch is infinite (-inf); give a finite number, at least 1."),
        ({"width": 7}, "width must be a multiple of 32 at least 32, got 7."),
        ({"layers": 10}, "layers must be at most 9, got 10."),
        ({"limit": 0}, "limit must be at least 1, got 0."),
        ({"task": "three"}, "task must be one of one, two, got 'three'."),
        ({"device": "foo"}, "device must be cpu or cuda, got 'foo'."),
        ({"name": 5}, "name must be text, got 5."),
        ({"out": 5}, "out must be a path, got 5."),
        ({"data": 5}, "data must be a list, each item a path, got 5."),
        ({"data": ["a", 5]}, "data[1] must be a path, got 5."),
        ({"data": {"a": 1}}, "data must be a list, each item a path, got {'a': 1}."),
        ({"depths": (1, 0)}, "depths[1] must be at least 1, got 0."),
        ({"resume": "yes"}, "resume must be true or false, got 'yes'."),
        ({"keep": 1e-9}, "batch / keep is a pool of 3.2e+10 samples; expected at most 1048576: give a larger keep."),
    ],
)
def test_what_does_not_fit_is_told_by_field_expected_and_came(values, said):
    with pytest.raises(InvalidSettings, match="^" + re.escape(said)) as refused:
        Asked(**values)
    assert str(refused.value).count("\n") == 0


def test_all_problems_come_at_once_and_rules_need_sound_fields():
    with pytest.raises(InvalidSettings) as refused:
        Asked(batch="many", keep=0.0, layers=7, resume=3)
    assert [line.split(" ")[0] for line in str(refused.value).split("\n")] == ["batch", "keep", "resume"]
    with pytest.raises(InvalidSettings, match=r"(?s)^keep must be in.*\nbatch and layers are both odd\.$"):
        Asked(batch=3, layers=7, keep=2.0)


def test_lists_and_texts_become_tuples_and_paths_and_nothing_else_changes():
    asked = Asked(data=["a", Path("b")], out="c", depths=[1, 2], budget=3)
    assert asked == Asked(data=(Path("a"), Path("b")), out=Path("c"), depths=(1, 2), budget=3.0)
    assert Asked(data="one").data == (Path("one"),)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(Asked.__dataclass_fields__)), anything))
def test_any_value_is_taken_or_refused_with_its_field(values):
    try:
        Asked(**values)
    except InvalidSettings as refused:
        lines = str(refused).split("\n")
        assert all(re.match(rf"({'|'.join(values)}|batch / keep)\b", line) for line in lines)
