"""The runner: it scores as it is configured, in chunks that need no more memory than a step, and prices by FLOPs."""

import pytest
import torch

from earlysift import SiftConfig, costs, pools, scorers
from earlysift.anatomy import find_anatomy
from earlysift.control import Control
from earlysift.ledger import Ledger
from earlysift.measures import MEASURES
from earlysift.runner import Runner
from models import VOCABULARY, build


def runner_of(model, **options):
    return Runner(model, SiftConfig(**{"dtype": None} | options), None, None, Ledger())


def pool_of(rows=12):
    ids = torch.randint(3, VOCABULARY, (rows, 10), generator=torch.Generator().manual_seed(0))
    return pools.checked({"input_ids": ids, "labels": torch.where(ids % 4 == 0, ids, -100)})


@pytest.mark.parametrize(("score", "rows"), [("loss", 8), ("margin", 8), ("exact", 4)])
def test_rows_at_once_are_twice_the_kept_at_an_exit_and_the_kept_in_the_full_model(score, rows):
    model = build("bert", "masked_lm")
    runner, pool = runner_of(model, score=score), pool_of()
    seen = []
    first = find_anatomy(model).layers[0]
    with first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]))):
        scores = runner.score(pool, runner.approximation, kept=4)
    assert max(seen) == rows
    torch.testing.assert_close(scores, runner.approximation(model, pool, dtype=None))
    assert len(runner.ledger.times_ms("score")) == 1


@pytest.mark.parametrize("name", MEASURES)
def test_the_approximation_moves_to_another_exit(name):
    runner = runner_of(build("bert", "masked_lm"), score=name, depth=1)
    assert runner.at(3) == scorers.at_exit(MEASURES[name], 3)
    assert runner.approximation == scorers.at_exit(MEASURES[name], 1)
    exact = runner_of(build("bert", "masked_lm"), score="exact")
    assert exact.at(3) == exact.approximation == scorers.exact()


def test_flops_of_operations_are_those_of_the_law():
    model = build("bert", "masked_lm")
    runner, pool = runner_of(model), pool_of()
    runner.verify(pool)
    found = runner.flops(pool, Control(depths=(1, 2)), kept=4)
    labelled = (pool.data["labels"] != -100).sum(dim=1)

    def flops(rows, depth, skips):
        law = costs.flops_law(find_anatomy(model), depth, skips_unlabelled=skips)
        return law.flops(rows=rows, length=10, labelled=int(labelled[:rows].sum()))

    assert found == {
        "train": 3 * flops(4, None, False),
        "probe": flops(12, None, False),
        "score_1": flops(12, 1, True),
        "score_2": flops(12, 2, True),
    }


def test_a_model_that_cannot_be_taken_apart_works_with_a_scorer_of_ones_own():
    model = torch.nn.Linear(2, 1)
    runner = runner_of(model, score=lambda model, pool: pool["x"][:, 0])
    pool = pools.checked({"x": torch.arange(8.0).reshape(4, 2)})
    runner.verify(pool)
    assert runner.anatomy is None
    assert runner.score(pool, runner.approximation, kept=2).tolist() == [0, 2, 4, 6]
    runner.note_work(pool.data, "trained")
    assert runner.ledger.end().keys() <= {"score_ms", "step_ms"}
