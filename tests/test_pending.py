"""Numbers on their way to the host: at once on a CPU; on an accelerator, waited for only by those who read them."""

import pytest
import torch

from earlysift import pending
from earlysift.pending import Pending

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_numbers_are_there_at_once():
    values = torch.tensor([3, 4])
    assert pending.number(values.sum()) == 7
    assert isinstance(pending.number(values.sum()), int)
    assert pending.number(values.sum(), lambda came: came / 2) == 3.5


def test_a_pending_number_is_what_it_would_have_been_at_once_however_often_it_is_read():
    value = Pending(torch.tensor(7), lambda came: came / 2)
    assert [value.read(), value.read()] == [3.5, 3.5]


def test_only_what_is_pending_is_read():
    entry = {"payoff": float("nan")}
    row = {"step": 3, "control": entry, "scored": Pending(torch.tensor(8), int), "mode": None}
    came = pending.arrived(row)
    assert came == {"step": 3, "control": entry, "scored": 8, "mode": None}
    assert came["control"] is entry
    assert isinstance(row["scored"], Pending)


@needs_gpu
def test_on_a_gpu_the_host_goes_on_until_it_reads_and_then_waits_for_nothing_told_later(no_waiting):
    big = torch.randn(8192, 8192, device="cuda")
    product = big @ big  # what libraries do once
    Pending(product.isfinite().sum(), int).read()
    before, after = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(20):
            product = big @ big
        count = pending.number(torch.isfinite(big).sum(), lambda came: came // 2)
        before.record()
        assert isinstance(count, Pending)
        assert not before.query()
        for _ in range(50):
            product = big @ big
        after.record()
        assert count.read() == 8192**2 // 2
        assert not after.query()
    torch.cuda.synchronize()
    assert product.shape == big.shape
