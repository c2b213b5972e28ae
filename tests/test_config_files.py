"""Settings: what a file may hold, and where two sets of settings differ."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlysift import schema
from earlysift.config_files import differences, read_settings

some_settings = st.dictionaries(st.sampled_from("abcde"), st.none() | st.integers(0, 2) | st.text(max_size=2))


@settings(deadline=None)
@given(some_settings, some_settings)
def test_differences_are_the_names_whose_values_are_not_the_same_in_order(saved, now):
    found = differences(saved, now)
    assert [name for name, _, _ in found] == sorted(n for n in {*saved, *now} if saved.get(n) != now.get(n))
    assert all((was, value) == (saved.get(name), now.get(name)) for name, was, value in found)
    assert [(name, value, was) for name, was, value in found] == differences(now, saved)
    assert differences(saved, dict(saved)) == []


@dataclass(frozen=True)
class Kind:
    out: Path = Path("a")
    data: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    seed: int = 0
    __post_init__ = schema.validate


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("given.json", '{"out": "b", "data": ["c", "d"], "checkpoint": null, "seed": 3}'),
        ("given.toml", 'out = "b"\ndata = ["c", "d"]\nseed = 3'),
    ],
)
def test_a_file_fills_the_dataclass_with_the_types_of_its_fields(name, content, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    assert read_settings(path, Kind) == Kind(out=Path("b"), data=(Path("c"), Path("d")), seed=3)


def test_a_name_that_is_no_setting_is_refused_with_those_that_are(tmp_path):
    path = tmp_path / "given.json"
    path.write_text('{"sed": 3}')
    with pytest.raises(ValueError, match=r"unknown settings \['sed'\]; known are checkpoint, data, out, seed"):
        read_settings(path, Kind)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("given.json", "5", "Expected settings by name in"),
        ("given.json", "null", "Expected settings by name in"),
        ("given.json", '["out", "b"]', "Expected settings by name in"),
        ("given.json", '"out"', "Expected settings by name in"),
        ("given.json", "[" * 100_000, "nested too deeply"),
        ("given.json", '{"out": ' * 100_000, "nested too deeply"),
        ("given.toml", "out = " + "[" * 100_000, "nested too deeply"),
        ("given.json", "", "is not a JSON file"),
        ("given.json", f'{{"seed": {"9" * 5000}}}', "is not a JSON file"),
        ("given.toml", "seed = nan", "seed is not a number"),
        ("given.json", '{"seed": "many", "data": [5]}', "seed must be a whole number, got 'many'."),
    ],
)
def test_a_file_of_another_shape_is_refused_by_its_name(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        read_settings(path, Kind)
    assert str(path) in str(refused.value)
