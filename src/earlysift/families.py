"""Families of models: rows of data that say where a model has the parts that an early exit needs.

Many rows are known, a model of your own may come with one, and where the structure is plain the row is derived from it:

    >>> Family(layers="blocks", heads=(("head",),), task="causal_lm").layers
    'blocks'

A row without layers changes the known or derived row of a model in the fields that it gives:

    >>> Family(labels="targets").labels
    ('targets',)

A transformers config may contain its row, under ``earlysift_family``:
``{"layers": "model.layers", "heads": [["lm_head"]], "task": "causal_lm", "positionwise": [["mlp"]]}``.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, get_args
from weakref import WeakKeyDictionary

from torch import nn

from earlysift.presets import Problem, Task


@dataclass(frozen=True)
class Family:
    """One row of data: where a model has the parts that an early exit needs.

    Attributes:
        layers: Path from the (unwrapped) model to its ``ModuleList`` or ``Sequential`` of layers; or several paths in
            calling order, as of an encoder and a decoder. An exit after d layers then runs the first d of each. None
            leaves what is not given here to the row that is known or derived.
        heads: Alternatives for the modules between the last states ``(R, T, D)`` and the logits, in calling order; the
            first alternative that the model has is used. Without any, the model's own logits are used, which needs
            memory for the logits of all positions of a chunk.
        task: What the labels mean; None infers it from the name of a transformers class.
        positionwise: Chains of modules of a layer, by path and in calling order, that process every position
            independently; the output of a module is used only by the later ones of its chain. At the exit they run at
            labelled positions only (`at_positions`).
        labels: Key of a batch that holds the labels, or the keys of starts and ends of answers; empty is ``"labels"``,
            and in question answering ``("start_positions", "end_positions")``.
        problem: What the labels of a sequence classification are: ``"single_label"`` (class ids, or probabilities of
            all classes), ``"multi_label"`` or ``"regression"``; None asks the model's config, then their shape.
    """

    layers: str | tuple[str, ...] | None = None
    heads: tuple[tuple[str, ...], ...] = ()
    task: Task | None = None
    positionwise: tuple[tuple[str, ...], ...] = ()
    labels: str | tuple[str, ...] = ()
    problem: Problem | None = None

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            object.__setattr__(self, "labels", (self.labels,))
        problems = [
            f"{name} must be tuples (lists, in a config) of names within one, got {getattr(self, name)!r}."
            for name in ("heads", "positionwise")
            if not _are_chains(getattr(self, name))
        ]
        if self.layers is not None and not (self.layers and _are_chains((self.paths,)) and all(self.paths)):
            problems.insert(0, f"layers must be a path, such as 'model.layers', or several, got {self.layers!r}.")
        if not (isinstance(self.labels, tuple) and all(isinstance(key, str) and key for key in self.labels)):
            problems.append(f"labels must be the name of a key, or a tuple of two, got {self.labels!r}.")
        for name, known in (("task", get_args(Task)), ("problem", get_args(Problem))):
            if getattr(self, name) is not None and getattr(self, name) not in known:
                problems.append(f"{name} must be one of {', '.join(known)} or None, got {getattr(self, name)!r}.")
        if problems:
            raise ValueError(" ".join(["Bad family row:", *problems]))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all lists of layers, in calling order."""
        return (self.layers,) if isinstance(self.layers, str) else self.layers or ()


def changed(row: Family | None, changes: Family) -> Family | None:
    """A row with all that another one gives.

    Example:
        >>> changed(Family("blocks", task="causal_lm"), Family(labels="targets"))
        Family(layers='blocks', heads=(), task='causal_lm', positionwise=(), labels=('targets',), problem=None)
    """
    given = {field.name: getattr(changes, field.name) for field in fields(Family)}
    return row and replace(row, **{name: value for name, value in given.items() if value})


def _are_chains(chains: object) -> bool:
    return isinstance(chains, tuple) and all(
        isinstance(chain, tuple) and chain and all(isinstance(name, str) for name in chain) for chain in chains
    )


_CLASSIFIERS = (("dropout", "classifier"), ("classifier",))
_AFTER_ATTENTION = (("attention.output", "intermediate", "output"),)
_LLAMA_LIKE = (("self_attn.o_proj",), ("mlp",))

FAMILIES: dict[str, Family] = {
    "bert": Family("bert.encoder.layer", (("cls",), *_CLASSIFIERS), positionwise=_AFTER_ATTENTION),
    "roberta": Family("roberta.encoder.layer", (("lm_head",), *_CLASSIFIERS), positionwise=_AFTER_ATTENTION),
    "distilbert": Family(
        "distilbert.transformer.layer",
        (("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"), *_CLASSIFIERS),
        positionwise=(("attention.out_lin",), ("ffn",)),
    ),
    "electra": Family(
        "electra.encoder.layer",
        (("generator_predictions", "generator_lm_head"), *_CLASSIFIERS),
        positionwise=_AFTER_ATTENTION,
    ),
    "modernbert": Family(
        "model.layers",
        (("head", "decoder"), ("head", "drop", "classifier")),
        positionwise=(("attn.Wo",), ("mlp",)),
    ),
    "deberta-v2": Family("deberta.encoder.layer", (("cls",), *_CLASSIFIERS), positionwise=_AFTER_ATTENTION),
    "gpt2": Family(
        "transformer.h", (("lm_head",), ("score",), *_CLASSIFIERS), positionwise=(("attn.c_proj",), ("mlp",))
    ),
    "llama": Family("model.layers", (("lm_head",), ("dropout", "score"), ("score",)), positionwise=_LLAMA_LIKE),
    "qwen3": Family("model.layers", (("lm_head",), ("dropout", "score"), ("score",)), positionwise=_LLAMA_LIKE),
    "vit": Family("vit.layers", (("classifier",),)),
}

IN_CONFIG = "earlysift_family"
"""A row under this name in a transformers config takes precedence over `FAMILIES`."""

# Rows derived so far: walking a model takes longer than many a kernel, and one that is shortened would not show them.
_DERIVED: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()

AS_JSON = """Write it as {"layers": "model.layers", "heads": [["lm_head"]], "task": "causal_lm"}."""


def configured(core: nn.Module) -> Family | None:
    """The row in a model's config, if it has one.

    Raises:
        ValueError: If it is no row.
    """
    values = getattr(getattr(core, "config", None), IN_CONFIG, None)
    if values is None:
        return None
    try:
        return Family(**{name: _tuples(value) for name, value in dict(values).items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected a family row under '{IN_CONFIG}' in the config, got {values!r}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def derived(core: nn.Module) -> Family | None:
    """The row of a model whose structure is plain; None if it is not.

    Its layers are the only list of like modules with weights (lists within a layer, as of experts, do not count), or
    the only two of an encoder-decoder; its head is the last module with weights beside them, as the model's own forward
    does all before that. That is a guess: `earlysift.checks.verified` compares it with the model.

    Args:
        core: The model, without wrappers.

    Example:
        >>> model = nn.Module()
        >>> model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> model.head = nn.Linear(2, 9)
        >>> derived(model)
        Family(layers='blocks', heads=(('head',),), task=None, positionwise=(), labels=(), problem=None)
    """
    if core in _DERIVED:
        return _DERIVED[core]
    paths = _layer_lists(core)
    if len(paths) != (2 if is_encoder_decoder(core) else 1):
        return None
    names = [name for name, module in core._modules.items() if module is not None and _weighs(module)]
    place = names.index(paths[-1].partition(".")[0])
    beside = names[place + 1 :] or names[:place]  # RoBERTa's head is defined in front of its layers
    layers = paths[0] if len(paths) == 1 else tuple(paths)
    return _DERIVED.setdefault(core, Family(layers, ((beside[-1],),) if beside else ()))


def is_encoder_decoder(core: nn.Module) -> bool:
    """Whether a model's config says that it is one."""
    return bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))


def has_stages(core: nn.Module) -> bool:
    """Whether a model's config says that its layers are stages, of several widths and resolutions."""
    return bool(getattr(getattr(core, "config", None), "depths", None))


def found(core: nn.Module) -> str:
    """What `derived` found in place of a single list of layers, in words."""
    lists = [f"{path} ({len(core.get_submodule(path)._modules)} layers)" for path in _layer_lists(core)]
    number = "are several lists" if len(lists) > 1 else "is one list"
    return f"there {number} of them, {', '.join(lists)}" if lists else "there is no list of like modules"


def _layer_lists(core: nn.Module) -> list[str]:
    """Paths of the outermost lists of layers: of two or more modules that all have weights.

    They are of one class; where there is no such list, as in hybrids, they are as many as the config says that the
    model has layers. What lies within any other list is part of one of its modules, and no list of layers either.
    """
    lists: dict[str, nn.Module] = {}
    for path, module in core.named_modules():
        several = isinstance(module, nn.ModuleList | nn.Sequential) and sum(map(_weighs, module)) > 1
        if path and several and not any(path.startswith(f"{outer}.") for outer in lists):
            lists[path] = module
    with_weights = {
        path: modules for path, module in lists.items() if all(map(_weighs, modules := list(module.children())))
    }
    alike = [path for path, modules in with_weights.items() if len({type(module) for module in modules}) == 1]
    named = getattr(getattr(core, "config", None), "num_hidden_layers", None)
    return alike or [path for path, modules in with_weights.items() if len(modules) == named]


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
