import random

import numpy as np
import pytest
import torch

from earlysift.seeds import reseeded, seeded


def test_seeded_generators_differ_by_key():
    draws = {torch.rand((), generator=seeded(*key)).item() for key in [(0, "a"), (0, "b"), (1, "a"), ("0", "a")]}
    assert len(draws) == 4


def test_equal_keys_give_equal_draws_and_the_global_generator_stays():
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(8, generator=seeded(3, "x")), torch.rand(8, generator=seeded(3, "x")))
    assert torch.equal(torch.get_rng_state(), before)


def test_reseeded_numbers_depend_on_the_key_alone_and_states_are_put_back_after_an_error():
    def draws(*key):
        with reseeded(*key, device=torch.device("cpu")):
            return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    first = draws(0, "score", 1)
    torch.rand(3)
    random.random()
    before = torch.get_rng_state(), random.getstate()
    assert draws(0, "score", 1) == first
    assert all(a != b for a, b in zip(draws(0, "score", 2), first, strict=True))
    with pytest.raises(ZeroDivisionError), reseeded(1, device=torch.device("cpu")):
        torch.rand(1 // 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
