"""Presets: what is known of models without torch."""

import subprocess
import sys
from typing import get_args

import pytest

from earlysift import anatomy
from earlysift.presets import BUILT_IN, Task, read_config, require_preset


def test_tasks_are_those_of_the_anatomy():
    assert get_args(Task) == get_args(anatomy.Task)


def test_built_in_models_are_known_without_torch():
    program = "import sys, earlysift.presets as p; p.read_config('bert-base'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_are_classes_that_transformers_has(name):
    transformers = pytest.importorskip("transformers")
    config = read_config(name)
    assert config["model_type"] in transformers.CONFIG_MAPPING
    assert all(hasattr(transformers, architecture) for architecture in config["architectures"])
    require_preset(name)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "Expected JSON in"), ("5", "Expected a mapping"), ("[" * 100_000, "Expected JSON in")]
)
def test_a_file_that_is_no_config_is_refused_by_name(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=said) as refused:
            require_preset(str(source))
        assert str(path) in str(refused.value)


def test_what_is_neither_there_nor_built_in_is_refused_with_what_is():
    with pytest.raises(ValueError, match="Unknown preset 'bert-huge'; known are bert-base"):
        require_preset("bert-huge")
    with pytest.raises(FileNotFoundError, match="or one of bert-base"):
        read_config("bert-huge")
