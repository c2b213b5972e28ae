"""Scores that no batch can be chosen by are refused; those that say that something is wrong are warned of."""

import logging
import warnings

import pytest
import torch
from torch import Generator, nn

import models
from earlysift import Sifter, judging
from earlysift.judging import Counted, Unusable

INF, NAN = float("inf"), float("nan")
NOTHING = {"unlabelled": 0, "non_finite": 0}


def counted(scores, kept):
    scores = torch.tensor(scores)
    return Counted(7, len(scores), kept, judging.count(scores))


def test_scores_are_counted_by_what_they_lack():
    assert judging.count(torch.tensor([1.0, -INF, NAN, INF, -INF])) == {"unlabelled": 2, "non_finite": 2}
    assert not counted([1.0], 1).is_pending()


@pytest.mark.parametrize("scores", [[1.0, 2.0, 3.0, 4.0], [-5.0, 0.0]])
def test_finite_scores_pass_in_silence(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judging.require_usable(counted(scores, 2), NOTHING)


@pytest.mark.parametrize("late", [False, True])
def test_a_pool_without_labels_is_refused_and_its_step_named_when_others_have_come(late):
    message = r"None of the 2 candidates at step 7 has" if late else r"None of the 2 candidates has a labelled position"
    with pytest.raises(ValueError, match=message):
        judging.require_usable(counted([-INF, -INF], 1), NOTHING, late=late)


def test_too_few_finite_scores_are_unusable():
    with pytest.raises(Unusable, match=r"at least 2 candidates with a finite score, got 1 of 3 at step 7: 2 are nan"):
        judging.require_usable(counted([NAN, INF, 1.0], 2), NOTHING)


def test_what_was_warned_of_once_is_not_warned_of_again():
    with pytest.warns(UserWarning, match="1 of 4 scores are nan or inf at step 7"):
        judging.require_usable(counted([NAN, 1.0, 2.0, 3.0], 2), NOTHING)
    with pytest.warns(UserWarning, match="Only 1 of 3 candidates have a labelled position, fewer than the 2 kept"):
        judging.require_usable(counted([-INF, 1.0, -INF], 2), NOTHING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judging.require_usable(counted([NAN, 1.0, -INF, -INF], 2), {"unlabelled": 3, "non_finite": 1})


@pytest.mark.parametrize("scores", [None, 1.0, torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.complex64)])
def test_what_is_not_one_real_number_per_candidate_is_refused(scores):
    with pytest.raises(ValueError, match=r"Expected scores of shape \(4,\), one per candidate, got "):
        judging.require_scores(scores, 4)


def test_the_second_broken_probe_in_a_row_is_warned_of(caplog):
    caplog.set_level(logging.WARNING, logger="earlysift")
    before = 0
    for step, correlation in enumerate((-1.0, 0.0, 0.5, -0.2, -0.2, -0.2)):
        before = judging.broken_probes(correlation, step, 1, before)
    assert before == 3
    assert [record.args[0] for record in caplog.records] == [4]  # not 0, where an exit is untrained, and not again


def test_norms_that_would_learn_from_selected_samples_are_warned_of_once(caplog):
    model = models.build("plain", "masked_lm", norm=nn.BatchNorm1d)
    pool = models.batch_for(model, "masked_lm", 8, 10, Generator().manual_seed(0))
    caplog.set_level(logging.WARNING, logger="earlysift")
    for keep in (1.0, 0.5):
        sifter = Sifter(model, keep=keep, family=models.row_of(model))
        for _ in range(2):
            sifter.sift(pool)
        assert [record.args for record in caplog.records] == [("norm",)] * (keep < 1)
    model.norm.eval()
    Sifter(model, keep=0.5, family=models.row_of(model)).sift(pool)
    assert len(caplog.records) == 1
