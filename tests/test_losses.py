"""Per-sample losses and entropies: equal to their slow twins, independent of chunks and padding, small in memory."""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import reference
from earlysift import fidelity, losses, scorers, selectors
from earlysift.measures import ENTROPY, LOSS, MARGIN, MEASURES

every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
R, T, D, V, C = 7, 13, 16, 101, 5
INF, NAN = float("inf"), float("nan")
TWINS = {
    "token_scores": losses,
    "positions_to_read": losses,
    "class_scores": losses,
    "greedy": selectors,
    "ranking": selectors,
    "fidelity": fidelity,
}


def linear(width=D, classes=V, seed=0):
    head = nn.Linear(width, classes)
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head.requires_grad_(False)


def states_and_labels(seed=0, rows=R, length=T, share=0.4):
    generator = Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, D, generator=generator)
    labels = torch.randint(V, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) > share] = -100
    labels[:, 1] = 3
    labels[2] = -100  # a sample without labels
    return hidden, labels


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", TWINS)
def test_twins_have_the_signatures_of_the_fast_functions(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(TWINS[name], name))


def test_every_public_twin_is_compared():
    public = {n for n, f in inspect.getmembers(reference, inspect.isfunction) if f.__module__ == reference.__name__}
    others = {"augment_images"}  # compared in test_images.py
    assert {name for name in public if not name.startswith("_")} == set(TWINS) | others


@pytest.mark.parametrize("max_positions", [None, 1, 3, 100])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1024])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("causal", [False, True])
@every_measure
def test_token_functions_equal_their_twins(measure, causal, reduction, chunk_tokens, max_positions):
    hidden, labels = states_and_labels()
    positions = max_positions and losses.positions_to_read(labels, causal=causal, max_positions=max_positions)
    arguments = {"causal": causal, "reduction": reduction, "chunk_tokens": chunk_tokens, "positions": positions}
    fast = losses.token_scores(measure, hidden, labels, linear(), **arguments)
    assert fast.dtype == torch.float32
    assert fast.shape == (R,)
    close(
        fast,
        reference.token_scores(measure, hidden, labels, linear(), **arguments),
        2e-6 if reduction == "sum" else 1e-6,
    )


@pytest.mark.parametrize("max_positions", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_positions_to_read_equal_their_twin(causal, max_positions):
    _, labels = states_and_labels()
    arguments = {"causal": causal, "max_positions": max_positions}
    fast, twin = (module.positions_to_read(labels, **arguments) for module in (losses, reference))
    assert fast.dtype == twin.dtype == torch.long
    assert len(fast) == len(set(fast.tolist())) == len(twin)
    assert set(fast.tolist()) == set(twin.tolist())


@pytest.mark.parametrize("most", [1, 4, 16, 64, 128])
def test_few_positions_lie_spread_over_a_sample_and_are_the_same_in_all(most):
    length = 512
    labels = torch.zeros(2, length, dtype=torch.long)
    first, second = losses.positions_to_read(labels, max_positions=most).view(2, most).sort(dim=1).values
    assert torch.equal(first, second - length)
    positions = [-1, *first.tolist(), length]
    assert max(after - before for before, after in itertools.pairwise(positions)) <= 3 * length / (most + 1)


def test_as_many_positions_as_there_are_labels_are_all_of_them():
    hidden, labels = states_and_labels(seed=2)
    every = int((labels != -100).sum(dim=1).max())
    positions = losses.positions_to_read(labels, max_positions=every)
    close(
        losses.token_scores(LOSS, hidden, labels, linear(), positions=positions),
        losses.token_scores(LOSS, hidden, labels, linear()),
    )


@pytest.mark.parametrize("causal", [False, True])
@every_measure
def test_chunk_size_changes_nothing(measure, causal):
    hidden, labels = states_and_labels(seed=1)
    function = partial(losses.token_scores, measure)
    whole = function(hidden, labels, linear(), causal=causal)
    for chunk_tokens in (1, 2, 3, 5, 17, 64):
        close(function(hidden, labels, linear(), causal=causal, chunk_tokens=chunk_tokens), whole, 5e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_on_the_right_changes_nothing(causal):
    hidden, labels = states_and_labels(seed=2)
    padded = F.pad(hidden, (0, 0, 0, 9), value=50.0), F.pad(labels, (0, 9), value=-100)
    close(
        losses.token_scores(LOSS, *padded, linear(), causal=causal),
        losses.token_scores(LOSS, hidden, labels, linear(), causal=causal),
    )


def test_padding_on_the_left_changes_nothing():
    hidden, labels = states_and_labels(seed=2)
    labels[:, 0] = -100  # what the first position is asked depends on what stands before it when causal
    padded = F.pad(hidden, (0, 0, 9, 0), value=50.0), F.pad(labels, (9, 0), value=-100)
    for causal in (False, True):
        expected = losses.token_scores(LOSS, hidden, labels, linear(), causal=causal)
        close(losses.token_scores(LOSS, *padded, linear(), causal=causal), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_samples_do_not_see_each_other(causal):
    hidden, labels = states_and_labels(seed=3)
    together = losses.token_scores(LOSS, hidden, labels, linear(), causal=causal)
    alone = [losses.token_scores(LOSS, hidden[i : i + 1], labels[i : i + 1], linear(), causal=causal) for i in range(R)]
    close(together, torch.cat(alone))
    order = torch.randperm(R, generator=Generator().manual_seed(0))
    assert torch.equal(
        losses.token_scores(LOSS, hidden[order], labels[order], linear(), causal=causal), together[order]
    )


@pytest.mark.parametrize("measure", [LOSS, ENTROPY, MARGIN], ids=lambda measure: measure.name)
def test_bfloat16_states_give_float32_no_worse_than_plain_pytorch(measure):
    hidden, labels = states_and_labels(seed=4)
    head = linear().bfloat16()
    ours = losses.token_scores(measure, hidden.bfloat16(), labels, head)
    assert ours.dtype == torch.float32
    exact_head = linear().bfloat16().double()
    truth = reference.token_scores(measure, hidden.bfloat16().double(), labels, exact_head)
    log_p = F.log_softmax(head(hidden.bfloat16()), dim=-1)
    labelled = labels != -100
    first, second = log_p.exp().topk(2).values.unbind(-1)
    per_position = {
        LOSS: -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0],
        ENTROPY: -(log_p.exp() * log_p).sum(-1),
        MARGIN: 1 - (first - second),
    }[measure]
    plain = (per_position * labelled).sum(dim=1) / labelled.sum(dim=1).bfloat16()
    has_labels = labelled.any(dim=1)
    error_of_plain = (plain.float() - truth)[has_labels].abs().max()
    assert error_of_plain > 0
    assert (ours - truth)[has_labels].abs().max() <= error_of_plain + 1e-6


@every_measure
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_without_labels_is_minus_infinity(measure, reduction):
    hidden, labels = states_and_labels()
    scores = losses.token_scores(measure, hidden, labels, linear(), reduction=reduction)
    assert scores[2] == -INF
    assert torch.isfinite(scores[[0, 1, 3, 4, 5, 6]]).all()
    nothing = losses.token_scores(measure, hidden, torch.full_like(labels, -100), linear(), reduction=reduction)
    assert torch.equal(nothing, torch.full((R,), -INF))


def test_one_position_has_no_next_label():
    hidden, labels = torch.randn(3, 1, D, generator=Generator().manual_seed(0)), torch.tensor([[1], [2], [3]])
    assert torch.equal(losses.token_scores(LOSS, hidden, labels, linear(), causal=True), torch.full((3,), -INF))
    assert torch.isfinite(losses.token_scores(LOSS, hidden, labels, linear())).all()


@every_measure
def test_nan_stays_nan_and_stays_with_its_sample(measure):
    hidden, labels = states_and_labels()
    clean = losses.token_scores(measure, hidden, labels, linear())
    hidden[4, 1] = NAN  # labelled
    hidden[5, int((labels[5] == -100).nonzero()[0])] = NAN  # not labelled
    scores = losses.token_scores(measure, hidden, labels, linear())
    assert torch.isnan(scores[4])
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(scores[others], clean[others])


def test_infinite_loss_stays_infinite():
    hidden, labels = states_and_labels()
    head = linear()
    head.bias[3] = -INF  # every sample but the third has label 3 at position 1
    scores = losses.token_scores(LOSS, hidden, labels, head)
    assert torch.equal(scores, torch.tensor([INF, INF, -INF, INF, INF, INF, INF]))


def test_impossible_classes_add_nothing_to_the_entropy():
    hidden, labels = states_and_labels()
    head = linear()
    head.bias[7] = -INF
    close(losses.token_scores(ENTROPY, hidden, labels, head), reference.token_scores(ENTROPY, hidden, labels, head))
    logits = torch.tensor([[1.0, 2.0, -INF]])
    close(
        losses.class_scores(ENTROPY, logits, torch.tensor([0])),
        reference.class_scores(ENTROPY, logits, torch.tensor([0])),
    )


def test_gradients_are_those_of_the_plain_loss():
    hidden, labels = states_and_labels(seed=5)
    head = linear().requires_grad_(True)
    ours = losses.token_scores(LOSS, hidden.requires_grad_(True), labels, head, reduction="sum", chunk_tokens=3)
    got = torch.autograd.grad(ours[labels.ne(-100).any(dim=1)].sum(), [hidden, *head.parameters()])
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    for gradient, expected in zip(got, torch.autograd.grad(plain, [hidden, *head.parameters()]), strict=True):
        close(gradient, expected, 1e-5)


def kinds(rows=R, seed=0):
    generator = Generator().manual_seed(seed)
    single = torch.randn(rows, C, generator=generator), torch.randint(C, (rows,), generator=generator)
    multi = torch.randn(rows, C, generator=generator), torch.randint(2, (rows, C), generator=generator).float()
    one = torch.randn(rows, 1, generator=generator), torch.randn(rows, generator=generator)
    column = torch.randn(rows, 1, generator=generator), torch.randn(rows, 1, generator=generator)
    several = torch.randn(rows, C, generator=generator), torch.randn(rows, C, generator=generator)
    return {
        "single_label": (*single, None),
        "multi_label": (*multi, None),
        "multi_label_whole_numbers": (multi[0], multi[1].long(), None),
        "regression": (*one, None),
        "regression_column": (*column, None),
        "regression_of_several": (*several, "regression"),
    }


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize(
    ("measure", "kind"),
    [(measure, kind) for measure in MEASURES.values() for kind in kinds() if measure.of_numbers or "label" in kind],
)
def test_class_scores_equal_their_twin(measure, kind, unlabelled):
    logits, labels, problem = kinds()[kind]
    if unlabelled:
        labels[3] = -100
    fast = losses.class_scores(measure, logits, labels, problem=problem)
    assert fast.dtype == torch.float32
    assert fast.shape == (R,)
    assert (fast == -INF).tolist() == [unlabelled and row == 3 for row in range(R)]
    close(fast, reference.class_scores(measure, logits, labels, problem=problem))


@every_measure
@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_class_scores_keep_nan_and_are_float32_from_bfloat16(measure, kind):
    logits, labels, _ = kinds()[kind]
    logits[2, 1] = NAN
    scores = losses.class_scores(measure, logits.bfloat16(), labels)
    assert scores.dtype == torch.float32
    assert torch.isnan(scores).tolist() == [row == 2 for row in range(R)]
    close(scores, losses.class_scores(measure, logits, labels), 3e-2)


def test_confident_classes_have_no_entropy():
    certain = torch.tensor([[200.0, -200.0, -200.0]])
    assert losses.class_scores(ENTROPY, certain, torch.tensor([0])).item() == 0
    assert losses.class_scores(ENTROPY, certain, torch.tensor([[1.0, 0.0, 0.0]])).item() == 0
    even = losses.class_scores(ENTROPY, torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert even.item() == pytest.approx(math.log(2))


def test_certain_predictions_have_the_smallest_margin_score_and_ties_the_largest():
    logits = torch.tensor([[200.0, -200.0, -200.0], [7.0, 7.0, -200.0]])
    close(losses.class_scores(MARGIN, logits, torch.tensor([0, 0])), torch.tensor([0.0, 1.0]))


def test_labelled_positions_are_those_the_head_is_asked_about():
    labels = torch.tensor([[5, -100, 7], [-100, -100, -100]])
    assert losses.labelled_positions(labels).tolist() == [[True, False, True], [False, False, False]]
    assert losses.labelled_positions(labels, causal=True).tolist() == [[False, True], [False, False]]


class LargestVocabularyTensor(TorchDispatchMode):
    """Records the most rows of logits that any operation gives back."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.size(-1) == self.vocabulary:
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return output


@pytest.mark.parametrize("causal", [False, True])
@every_measure
def test_no_more_than_a_chunk_of_logits_ever_exists(measure, causal):
    hidden, labels = states_and_labels(rows=11, share=1.0)
    labelled = int(losses.labelled_positions(labels, causal=causal).sum())
    with LargestVocabularyTensor(V) as seen:
        losses.token_scores(measure, hidden, labels, linear(), causal=causal, chunk_tokens=16)
    assert seen.rows == 16 < labelled


class Operations(TorchDispatchMode):
    """Names of the operations that ran, and the shapes of what they gave back."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        shapes = [leaf.shape for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.seen.append((function.name(), shapes))
        return output


@every_measure
def test_few_positions_have_shapes_that_no_label_changes_and_ask_the_device_for_nothing(measure):
    seen = []
    for seed in (0, 1):
        hidden, labels = states_and_labels(seed, share=0.3 + 0.4 * seed)
        with Operations() as operations:
            positions = losses.positions_to_read(labels, max_positions=4)
            losses.token_scores(measure, hidden, labels, linear(), positions=positions)
        seen.append(operations.seen)
    assert seen[0] == seen[1]
    assert not {operation for operation, _ in seen[0]} & {"aten::nonzero", "aten::_local_scalar_dense"}


def test_fewer_than_one_position_are_refused():
    with pytest.raises(ValueError, match="max_positions must be at least 1 or None, got 0"):
        losses.positions_to_read(torch.zeros(2, 3, dtype=torch.long), max_positions=0)


def test_only_labelled_positions_pass_through_the_head():
    hidden, labels = states_and_labels()
    passed = []
    head = linear()
    losses.token_scores(LOSS, hidden, labels, lambda states: passed.append(len(states)) or head(states), chunk_tokens=4)
    assert sum(passed) == int((labels != -100).sum())
    assert max(passed) <= 4


@pytest.mark.parametrize(("device", "most"), [("cpu", 1024), ("meta", 4096)])  # meta, as any device that is no CPU
def test_an_accelerator_gets_larger_chunks(device, most):
    hidden, labels = torch.zeros(5, 1000, 4, device=device), torch.zeros(5, 1000, dtype=torch.long, device=device)
    passed, head = [], torch.nn.Linear(4, 3, device=device)
    places = torch.arange(5000, device=device)

    def counting(states):
        passed.append(len(states))
        return head(states)

    losses.token_scores(LOSS, hidden, labels, counting, positions=places)
    assert passed == [most] * (5000 // most) + [5000 % most]


# Chunks of 1024 positions; more labelled positions than that, in rows that are scored at once.
@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "llama", "plain"])
def test_scoring_a_pool_never_holds_its_logits(family):
    task = "causal_lm" if family in ("gpt2", "llama") else "masked_lm"
    model = models.build(family, task)
    inputs = torch.randint(3, V, (40, 40), generator=Generator().manual_seed(0))
    pool = {"input_ids": inputs, "labels": inputs}
    # The embedding and the tied output weights are (V, D): the vocabulary is never their last dimension but transposed.
    with LargestVocabularyTensor(V) as seen:
        scorers.early_exit_loss(model, pool, family=models.row_of(model), dtype=None)
    assert 0 < seen.rows <= 1024


@pytest.mark.parametrize(
    ("hidden", "labels", "message"),
    [
        (
            (2, 3),
            (2, 3),
            r"Expected hidden states \(R, T, D\) and labels \(R, T\), got \(2, 3\) and \(2, 3\)\. Give one label",
        ),
        ((2, 3, 4), (2,), r"got \(2, 3, 4\) and \(2,\)"),
        ((2, 3, 4), (3, 2), r"got \(2, 3, 4\) and \(3, 2\)"),
    ],
)
@every_measure
def test_shapes_that_do_not_belong_together_are_named(measure, hidden, labels, message):
    with pytest.raises(ValueError, match=message):
        losses.token_scores(measure, torch.zeros(hidden), torch.zeros(labels, dtype=torch.long), linear(4))


def test_a_misspelt_reduction_is_refused():
    hidden, labels = states_and_labels()
    with pytest.raises(ValueError, match="reduction"):
        losses.token_scores(LOSS, hidden, labels, linear(), reduction="avg")


def test_logits_per_position_are_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"Expected logits \(R, C\) for classification, got shape \(2, 3, 4\)\. Set the task"
    ):
        losses.class_scores(LOSS, torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))


def test_labels_that_fit_no_kind_are_refused_with_what_would_fit():
    with pytest.raises(
        ValueError, match=r"Labels of shape \(2, 3\) and dtype torch\.int64 do not fit logits \(2, 4\)\. Expected"
    ):
        losses.class_scores(LOSS, torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("measure", [ENTROPY, MARGIN])
def test_regression_has_no_distribution_and_says_what_to_use(measure):
    with pytest.raises(ValueError, match=r"regression output has none\. Use the loss-based score \(score='loss'\)"):
        losses.class_scores(measure, torch.zeros(2, 1), torch.zeros(2))


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_targets_that_are_partly_missing_are_left_out_of_the_mean_of_their_sample(kind):
    logits = torch.randn(4, 3, generator=Generator().manual_seed(0))
    targets = torch.tensor([[1.0, 0.0, 1.0], [1.0, -100.0, 0.0], [-100.0, -100.0, 1.0], [-100.0, -100.0, -100.0]])
    found = losses.class_scores(LOSS, logits, targets, problem=kind)
    each = F.binary_cross_entropy_with_logits if kind == "multi_label" else F.mse_loss
    expected = [each(logits[i, kept], targets[i, kept]) for i, kept in enumerate([[0, 1, 2], [0, 2], [2]])]
    close(found[:3], torch.stack(expected))
    assert found[3] == -INF


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.int32, torch.bool])
def test_labels_of_another_dtype_are_refused_with_the_right_one(measure, dtype):
    hidden, labels = states_and_labels()
    with pytest.raises(ValueError, match=rf"dtype torch.int64 \(class ids\), got {dtype}. Use labels.long"):
        losses.token_scores(measure, hidden, labels.to(dtype), linear())
    if not dtype.is_floating_point:
        with pytest.raises(ValueError, match=r"Use labels.long"):
            losses.class_scores(LOSS, torch.zeros(3, C), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("wrong", [V, V + 100, -1, -99])
def test_labels_out_of_range_are_refused_with_the_range(wrong):
    hidden, labels = states_and_labels()
    labels[-1, 1] = wrong
    with pytest.raises(ValueError, match=rf"Expected labels in 0..{V - 1}, or -100 .* got {wrong}\."):
        losses.token_scores(LOSS, hidden, labels, linear(), chunk_tokens=3)
    with pytest.raises(ValueError, match=rf"Expected labels in 0..{C - 1}, or -100 .* got {wrong}\."):
        losses.class_scores(LOSS, torch.zeros(2, C), torch.tensor([0, wrong]))


@every_measure
@pytest.mark.parametrize(
    ("labels", "problem"),
    [(torch.zeros(3, dtype=torch.int64), None), (torch.zeros(8), "multi_label"), (torch.zeros(8, C), "several")],
)
def test_labels_of_other_samples_or_classes_are_refused(measure, labels, problem):
    with pytest.raises(ValueError, match=r"fit logits \(8, 5\)"):
        losses.class_scores(measure, torch.zeros(8, C), labels, problem=problem)
