import torch

from earlysift.seeds import seeded


def test_seeded_generators_differ_by_key():
    draws = {torch.rand((), generator=seeded(*key)).item() for key in [(0, "a"), (0, "b"), (1, "a"), ("0", "a")]}
    assert len(draws) == 4


def test_equal_keys_give_equal_draws_and_the_global_generator_stays():
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(8, generator=seeded(3, "x")), torch.rand(8, generator=seeded(3, "x")))
    assert torch.equal(torch.get_rng_state(), before)
