"""What a process runs with: huge pages are asked for unless the user has decided, and results say so."""

import os

import pytest
import torch

from earlysift import environment

NAME = "THP_MEM_ALLOC_ENABLE"


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("1", "1")])
def test_huge_pages_are_asked_for_unless_the_user_has_decided(monkeypatch, before, after):
    monkeypatch.setenv(NAME, "")  # so that it is put back, whatever happens
    monkeypatch.delenv(NAME)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    environment.use_huge_pages()
    assert os.environ[NAME] == after
    assert environment.machine(torch.device("cpu"))["huge_pages"] == (after == "1")
