"""Fixtures that several test files share."""

import gc

import pytest
import torch


@pytest.fixture
def process_group(tmp_path):
    """A gloo process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()  # reducers must go before their group
    torch.distributed.destroy_process_group()
