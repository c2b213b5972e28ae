"""Versions: read without importing what they are of; a commit is that of earlysift."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from earlysift import versions


def test_the_line_names_what_results_depend_on():
    said = versions.line()
    assert said.startswith(f"earlysift {metadata.version('earlysift')} (python 3.")
    assert f", torch {torch.__version__}" in said


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_is_that_of_a_checkout_of_earlysift_only(tmp_path):
    if (checkout := Path(__file__).resolve().parents[1] / ".git").exists():
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=checkout.parent, capture_output=True, text=True, check=True
        )
        assert head.stdout.startswith(versions.commit().removesuffix("-dirty"))
    # An environment lies within the checkout of somebody else's project.
    installed = tmp_path / ".venv" / "earlysift"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    (tmp_path / "theirs.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init"], ["add", "theirs.py"], ["commit", "--message", "theirs"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert versions.commit(installed) is None
    assert versions.commit(tmp_path) is None


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(versions, "PACKAGES", ("torch", "no-such-package"))
    assert versions.installed().keys() == {"python", "torch"}
    assert versions.line().startswith("earlysift of unknown version (python 3.")
