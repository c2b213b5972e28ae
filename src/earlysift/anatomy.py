"""Where a model has its layers, its head and its labels: found once, from the row of its family.

A row of data tells it: see `earlysift.families`. What a row does not fit is told with its remedy.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast, get_args

from torch import nn

from earlysift import families, pools
from earlysift.families import FAMILIES, Family
from earlysift.presets import BY_TOKEN, Task
from earlysift.presets import Problem as Kind

_TASK_OF_CLASS_SUFFIX: dict[str, Task] = {
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "MTModel": "seq2seq_lm",
    "ForTokenClassification": "token_classification",
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "sequence_classification",
    "ForQuestionAnswering": "question_answering",
    "ForCTC": "ctc",
}
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_ANSWER = ("start_positions", "end_positions")
_REFUSED_WRAPPERS = {
    "DataParallel": (
        "DataParallel copies the model at every call, and the copies are not shortened.",
        "Use DistributedDataParallel, or pass the wrapped model (model.module) and train on one device.",
    ),
    "AveragedModel": (
        "AveragedModel holds averages of weights, not the model that is trained.",
        "Pass the model that is trained, and average its weights separately.",
    ),
}


class Problem(NamedTuple):
    """One reason why a model cannot be used for sifting, and its remedy."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}"


class Anatomy(NamedTuple):
    """The parts of one model: its core without wrappers, layer list, names of the head modules, and task.

    In sequence classification the model pools between states and logits, so ``head`` is empty and ``classifier`` names
    the modules after (or including) the pooling. ``positionwise``: see `Family`. ``derived``: whether its row
    is a guess. ``labels``: keys of a batch that hold the labels. ``problem``: kind of labels, by the row. ``earlier``:
    lists of layers that run before ``layers`` and are cut to the same depth.
    """

    core: nn.Module
    layers: nn.ModuleList | nn.Sequential
    head: tuple[str, ...]
    task: Task
    classifier: tuple[str, ...] = ()
    positionwise: tuple[tuple[str, ...], ...] = ()
    derived: bool = False
    labels: tuple[str, ...] = ("labels",)
    problem: Kind | None = None
    earlier: tuple[nn.ModuleList | nn.Sequential, ...] = ()

    @property
    def by_token(self) -> bool:
        """Whether the head predicts at every position; else the model's own output is scored as a whole."""
        return self.task in BY_TOKEN

    @property
    def lists(self) -> tuple[nn.ModuleList | nn.Sequential, ...]:
        """All lists of layers, in calling order."""
        return *self.earlier, self.layers


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, Lightning Fabric and PEFT wrappers.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> unwrap(torch.compile(net, backend="eager")) is net
        True
    """
    *_, core = wrapping(model)
    return core


def wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The given model, and the content of each wrapper, down to the core."""
    while True:
        yield model
        if "_forward_module" in model._modules:  # Fabric's wrapper, which forwards attribute access
            model = cast(nn.Module, model._forward_module)
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = cast(Any, model).get_base_model()
        else:
            return


def find_anatomy(model: nn.Module, family: Family | None = None) -> Anatomy:
    """Locate layers, head and task of a model.

    Args:
        model: The model, wrapped or not.
        family: A row for a model that `FAMILIES` does not know.

    Raises:
        ValueError: With all problems found, if the model does not fit its row.
    """
    found = anatomy_or_problems(model, family)
    if isinstance(found, Anatomy):
        return found
    raise ValueError(problem_report(model, found))


def problem_report(model: nn.Module, problems: list[Problem]) -> str:
    """One message that lists all problems of a model."""
    lines = "\n".join(f"- {problem}" for problem in problems)
    return f"{type(unwrap(model)).__name__} cannot be sifted with:\n{lines}"


def anatomy_or_problems(model: nn.Module, family: Family | None) -> Anatomy | list[Problem]:
    """The result of `find_anatomy`, or all problems of the model's structure."""
    core = unwrap(model)
    name = type(core).__name__
    if name in _REFUSED_WRAPPERS:
        return [Problem(*_REFUSED_WRAPPERS[name])]
    config = getattr(core, "config", None)
    groups, count = (getattr(config, name, None) for name in ("num_hidden_groups", "num_hidden_layers"))
    if groups and count and groups < count:
        return [
            Problem(
                f"{name} shares weights between its layers, as ALBERT does: it calls {groups} of them {count} times, "
                "and an exit is behind a layer, not behind a call.",
                "Use a score that needs no exit: your own callable, or remembered losses in a loop of your own "
                "(score='memory', Sifter.observe).",
            )
        ]
    model_type = getattr(config, "model_type", None)
    if family is not None and not isinstance(family, Family):
        raise ValueError(f"Expected family to be a Family(layers=..., heads=..., task=...), got {family!r}.")
    try:
        configured = families.configured(core) if family is None or family.layers is None else None
    except ValueError as error:
        return [Problem(str(error), families.AS_JSON)]
    given = [row for row in (configured, family) if row is not None]
    row, is_derived = _row_of(core, given)
    if row is None:
        return [
            Problem(
                f"The model family of {name} is unknown"
                + (f" (model_type {model_type!r})" if model_type else "")
                + f", and its layers cannot be told: {families.found(core)}.",
                "Pass a row: family=Family(layers='path.to.its.ModuleList', heads=(('lm_head',),), task='causal_lm'), "
                f"or put one under '{families.IN_CONFIG}' into the model's config.json.",
            )
        ]
    lists = [_submodule(core, path) for path in row.paths]
    layers = lists[-1]
    task = row.task or _task_of_class(core)
    named = next((h for h in row.heads if all(part in core._modules for part in h)), ())
    # In sequence classification the head pools over positions, so the model's own logits are scored.
    head = named if task in BY_TOKEN else ()
    classifier = named if task == "sequence_classification" else ()
    usual_keys = _ANSWER if task == "question_answering" else (pools.LABELS_KEY,)
    keys = tuple(row.labels) or usual_keys
    rules = [rule for path, found in zip(row.paths, lists, strict=True) for rule in _rules_of_layers(name, path, found)]
    rules += [
        (
            task is None,
            f"What the labels of {name} mean is unknown.",
            f"Set task= in the family row, as in family=Family(layers={row.layers!r}, heads={row.heads!r}, task=...): "
            f"{', '.join(get_args(Task))}.",
        ),
        (
            task != "sequence_classification" and any(each.heads for each in given) and not named,
            f"{name} has none of the heads {row.heads} named in its family row as direct submodules.",
            f"Its submodules are {tuple(core._modules)}; leave heads empty to use the model's own logits.",
        ),
        (
            task == "causal_lm" and families.is_encoder_decoder(core),
            f"{name} is an encoder-decoder, which predicts labels at their own positions, but causal_lm shifts labels "
            "by one position.",
            "Set task='seq2seq_lm' in the family row.",
        ),
        (
            isinstance(layers, nn.ModuleList | nn.Sequential)
            and 0 < (getattr(config, "rescale_every", 0) or 0) < len(layers),
            f"{name} halves weights of later layers for evaluation and doubles them again for training, also those of "
            "layers that an exit left out: scoring would change its weights.",
            "Set rescale_every=0 in its config.",
        ),
        (
            len(keys) != len(usual_keys),
            f"Expected {len(usual_keys)} keys of labels for {task}, as {usual_keys}, got {keys}.",
            "Name as many in the family row.",
        ),
        (
            task == "ctc" and not hasattr(config, "ctc_loss_reduction"),
            f"A CTC loss is asked of the model itself, and {name} has no config.ctc_loss_reduction.",
            "Use a CTC model of transformers, or score with your own callable.",
        ),
    ]
    problems = [Problem(reason, remedy) for wrong, reason, remedy in rules if wrong]
    if problems:
        return problems
    if any(getattr(config, name, None) for name in _CAPS) or "final_logits_bias" in core._buffers:
        head = ()  # the model's forward applies the cap, or adds the bias, after the head
    assert isinstance(layers, nn.ModuleList | nn.Sequential)
    assert task is not None
    positionwise = row.positionwise if head and _can_skip_unlabelled(core, layers, row) else ()
    earlier = tuple(cast(list[nn.ModuleList | nn.Sequential], lists[:-1]))
    return Anatomy(core, layers, head, task, classifier, positionwise, is_derived, keys, row.problem, earlier)


def _row_of(core: nn.Module, given: list[Family]) -> tuple[Family | None, bool]:
    """The row with layers that is given, known or derived, changed by all given ones; and whether it is derived."""
    listed = FAMILIES.get(str(getattr(getattr(core, "config", None), "model_type", None)))
    if listed is not None and any(_submodule(core, path) is None for path in listed.paths):
        listed = None  # Llama's readers call their base another
    known = next((row for row in given if row.layers), None) or listed
    row = known or families.derived(core)
    for changes in given:
        row = families.changed(row, changes)
    return row, known is None


def _task_of_class(core: nn.Module) -> Task | None:
    name = type(core).__name__
    task = next((task for suffix, task in _TASK_OF_CLASS_SUFFIX.items() if name.endswith(suffix)), None)
    # Models that read images and texts, as Llava, generate, too, and are decoders.
    return None if task == "seq2seq_lm" and not families.is_encoder_decoder(core) else task


def _rules_of_layers(name: str, path: str, layers: nn.Module | None) -> list[tuple[bool, str, str]]:
    found = "nothing" if layers is None else type(layers).__name__
    return [
        (
            not isinstance(layers, nn.ModuleList | nn.Sequential),
            f"Expected a ModuleList or Sequential of layers at '{path}' of {name}, got {found}.",
            "Give the path of the layer list in the family row; `model.named_modules()` lists the paths.",
        ),
        (
            isinstance(layers, nn.ModuleList | nn.Sequential) and not len(layers),
            f"The list of layers at '{path}' of {name} is empty.",
            "Give the path of another list.",
        ),
    ]


def _can_skip_unlabelled(core: nn.Module, layers: nn.ModuleList | nn.Sequential, row: Family) -> bool:
    """Whether layers have the position-wise modules of their row, and no other part needs all positions.

    Wrappers may hide modules; a convolution mixes positions, and a chunked feed-forward part depends on their number.
    """
    names = [name for chain in row.positionwise for name in chain]
    found = all(_submodule(layer, name) is not None for layer in layers for name in names)
    config = getattr(core, "config", None)
    return found and not any(getattr(config, name, 0) for name in ("conv_kernel_size", "chunk_size_feed_forward"))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether any of these modules is compiled itself."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)
