"""Early exits of the model itself: where its layers and head are, and context managers that leave parts of it out.

`truncated` shortens the layer list in place and always restores it. The model's own forward does the rest, in every
precision, wrapped or compiled. A copy of the model would look cleaner but is wrong: with a forward bound to the
instance (accelerate's mixed precision, ``model.compile()``) it silently runs all layers.

Where a model has its layers and head is a row of data: see `earlysift.families`.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from earlysift import families, pools
from earlysift.families import FAMILIES, Family
from earlysift.measures import IGNORED_LABEL
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
_CACHE = "use_cache"
_ANSWER = ("start_positions", "end_positions")
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_DECODED = {"decoder_input_ids", "decoder_inputs_embeds"}
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
        >>> net = nn.Linear(2, 2)
        >>> unwrap(torch.compile(net, backend="eager")) is net
        True
    """
    *_, core = _layers_of_wrapping(model)
    return core


def _layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
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


@contextmanager
def truncated(
    model: nn.Module,
    depth: int,
    *,
    family: Family | None = None,
    exit_head: nn.Module | None = None,
    detach_exit: bool = False,
) -> Iterator[None]:
    """Shorten the model itself to its first ``depth`` layers within this context.

    Its own final norm and head follow the last of them. Not thread-safe, because the model itself is changed; it is
    restored on exceptions too.

    Args:
        model: The model, wrapped or not.
        depth: Number of layers to keep, 1 to the number of layers (all of them: the full model); of every list, where
            the family has several, and of the last one counted.
        family: A row for a model that `FAMILIES` does not know.
        exit_head: Module that follows the last remaining layer (see `ExitHead`).
        detach_exit: Whether gradients of the exit stop at the exit head.

    Raises:
        ValueError: If the family is unknown or depth is out of range.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = nn.Module()
        >>> model.blocks = net
        >>> with truncated(model, 1, family=Family("blocks", task="masked_lm")):
        ...     len(model.blocks)
        1
        >>> len(model.blocks)
        3
    """
    anatomy = find_anatomy(model, family)
    with shortened(anatomy, depth, exit_head=exit_head, detach_exit=detach_exit):
        yield


@contextmanager
def shortened(
    anatomy: Anatomy, depth: int, *, exit_head: nn.Module | None = None, detach_exit: bool = False
) -> Iterator[None]:
    """`truncated` for a model whose anatomy is known."""
    count = len(anatomy.layers)
    if not 1 <= depth <= count:
        raise ValueError(f"Expected depth in 1..{count} (the model's layers), got {depth}.")
    if hasattr(anatomy.core, "_get_fsdp_state"):
        # FSDP2 collects the modules of the model in its first pass, which must see the full model.
        cast(Any, anatomy.core)._get_fsdp_state()._lazy_init()
    with ExitStack() as stack:
        for layers in anatomy.earlier:
            stack.enter_context(_in_place_of(layers, list(layers)[:depth]))
        stack.enter_context(_replaced_layers(anatomy, list(anatomy.layers)[:depth], exit_head, detach_exit))
        hooked = _modules_with_capture_hooks(anatomy.core)  # in the shortened model, as the other layers do not run
        try:
            yield
        finally:
            _drop_new_capture_hooks(anatomy.core, hooked)


def _replaced_layers(
    anatomy: Anatomy, layers: list[nn.Module], exit_head: nn.Module | None, detach_exit: bool = False
) -> AbstractContextManager[None]:
    """Put these layers, the last one followed by the exit head, in place of all layers within this context."""
    if exit_head is not None:
        layers[-1] = _ExitLayer(layers[-1], exit_head, detach_exit)
    return _in_place_of(anatomy.layers, layers)


@contextmanager
def _in_place_of(all_layers: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Let a list hold these layers, its first ones or as many others, within this context."""
    modules = all_layers._modules
    all_layers._modules = dict(zip(modules, layers, strict=False))
    try:
        yield
    finally:
        all_layers._modules = modules


@contextmanager
def captured(anatomy: Anatomy, depth: int) -> Iterator[dict[int, Any]]:
    """Record the outputs of the first ``depth`` layers within this context, for `replayed`.

    Yields:
        Depth to output, in the order of layers; the next forward pass fills it.
    """
    with latest_outputs(dict(enumerate(list(anatomy.layers)[:depth], start=1))) as outputs:
        yield outputs


@contextmanager
def latest_outputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Any]]:
    """Record what each of these modules returned in its latest call within this context, by their numbers."""
    with _latest(modules, -1) as outputs:
        yield outputs


@contextmanager
def latest_inputs(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Any]]:
    """Record the positional arguments of the latest call of each of these modules within this context."""
    with _latest(modules, 0) as inputs:
        yield inputs


@contextmanager
def _latest(modules: Mapping[int, nn.Module], part: int) -> Iterator[dict[int, Any]]:
    calls: dict[int, Any] = {}

    def note(number: int, module: nn.Module, *call: Any) -> None:  # noqa: ARG001
        calls[number] = call[part]

    handles = [module.register_forward_hook(partial(note, number)) for number, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def states_of(output: Any) -> Tensor:
    """The states in the output of a layer, which some models put in front of a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def replayed(anatomy: Anatomy, outputs: Iterable[Any], *, exit_head: nn.Module | None = None) -> Iterator[None]:
    """Let the first layers return their `captured` outputs within this context, and leave the other layers out.

    A forward pass then runs no layer, so one full pass is enough for the exits at every depth: the model's own final
    norm and head follow each. Every layer gets a stand-in, because models compute between their layers.
    """
    recorded: list[nn.Module] = [
        _Recorded(layer, output) for layer, output in zip(anatomy.layers, outputs, strict=False)
    ]
    with _replaced_layers(anatomy, recorded, exit_head):
        yield


@contextmanager
def at_positions(anatomy: Anatomy, depth: int, positions: Tensor, shape: torch.Size) -> Iterator[None]:
    """Restrict the position-wise modules of the layer at an exit to some positions within this context.

    Elsewhere they return zeros; the model's output at these positions is unchanged. In a layer of BERT these modules
    are three quarters of the FLOPs.

    Args:
        anatomy: Where the layers are, and which of their modules are position-wise.
        depth: The exit: the number of its layer, counted from 1.
        positions: Positions, ``(N,)``, each as ``T * row + position``.
        shape: ``(R, T)``.
    """
    layer = list(anatomy.layers)[depth - 1]
    layer = layer.replaced if isinstance(layer, _ExitLayer) else layer
    swapped = []
    try:
        for chain in anatomy.positionwise:
            for name in {chain[0], chain[-1]}:
                path, _, own_name = name.rpartition(".")
                siblings = layer.get_submodule(path)._modules
                module = cast(nn.Module, siblings[own_name])
                first, last = name == chain[0], name == chain[-1]
                siblings[own_name] = _AtPositions(module, positions, shape, gathers=first, scatters=last)
                swapped.append((siblings, own_name, module))
        yield
    finally:
        for siblings, own_name, module in swapped:
            siblings[own_name] = module


def skips_unlabelled(model: nn.Module, anatomy: Anatomy, max_positions: int | None) -> bool:
    """Whether scoring at an exit of this model uses `at_positions`.

    Compiled models do so only if all pools have the same number of positions; each new number would be a recompilation.
    """
    return bool(anatomy.positionwise) and not (_compiled(_layers_of_wrapping(model)) and max_positions is None)


def is_compiled(model: nn.Module, anatomy: Anatomy) -> bool:
    """Whether the model or one of its layers is compiled."""
    return _compiled([*_layers_of_wrapping(model), *(layer for layers in anatomy.lists for layer in layers)])


def _compiled(modules: Iterable[nn.Module]) -> bool:
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)


def shapes_of_states(model: nn.Module, anatomy: Anatomy, inputs: Any) -> list[torch.Size]:
    """Shape of the states of a sample behind every layer, by a full pass of these inputs."""
    with (
        torch.no_grad(),
        uncompiled(),
        scoring_mode(model),
        captured(anatomy, len(anatomy.layers)) as outputs,
    ):
        run(model, inputs)
    return [states_of(output).shape[1:] for output in outputs.values()]


@contextmanager
def headless(anatomy: Anatomy) -> Iterator[None]:
    """Make the model return the states ``(R, T, D)`` that enter its head, instead of logits, within this context.

    The head modules are replaced in place by the identity, and always restored.
    """
    modules = anatomy.core._modules
    heads = {name: cast(nn.Module, modules[name]) for name in anatomy.head}
    modules.update({name: _Identity(module) for name, module in heads.items()})
    try:
        yield
    finally:
        modules.update(heads)


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within this context; afterwards every module has its own training flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models eagerly within this context; compile nothing new."""
    # Nothing is compiled before dynamo is loaded, and loading it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def head_of(anatomy: Anatomy) -> Callable[[Tensor], Tensor]:
    """The model's head as one function from states ``(n, D)`` to logits ``(n, V)``."""
    modules = [anatomy.core.get_submodule(name) for name in anatomy.head]

    def head(states: Tensor) -> Tensor:
        for module in modules:
            states = module(states)
        return states

    return head


def call(model: nn.Module, inputs: Any, *, synchronized: bool = False) -> Tensor:
    """The model's logits (within `headless`, the states that enter its head) for inputs without labels.

    Allocates no KV cache and requests no captured outputs, whatever the model's config says.

    Args:
        model: The model, wrapped or not.
        inputs: A mapping of keyword arguments, or one argument.
        synchronized: Whether a backward pass follows that DistributedDataParallel must synchronize.

    Returns:
        The ``logits`` of an output with names, else its first tensor.

    Raises:
        ValueError: If there is no such tensor.
    """
    return logits_of(run(model, inputs, synchronized=synchronized))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned; of question answering those of starts and ends, ``(R, 2, T)``.

    Raises:
        ValueError: If there are none.
    """
    unnamed = output[0] if isinstance(output, tuple | list) and output else output
    logits = named_output(output, "logits", unnamed)
    starts, ends = named_output(output, "start_logits"), named_output(output, "end_logits")
    if isinstance(starts, Tensor) and isinstance(ends, Tensor):
        logits = torch.stack([starts, ends], dim=1)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "Expected the model to return logits (a tensor, a tuple that begins with one, or an output with 'logits', "
            f"or with 'start_logits' and 'end_logits'), got {type(output).__name__}. Score with your own callable, or "
            "wrap the model."
        )
    return logits


def named_output(output: Any, name: str, otherwise: Any = None) -> Any:
    """What a model returned under a name, as an entry or as an attribute."""
    return output.get(name, otherwise) if isinstance(output, Mapping) else getattr(output, name, otherwise)


def states(model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor, *, synchronized: bool = False) -> Tensor:
    """What the losses of a batch's samples are computed from.

    That is what `call` returns, but for CTC the model's own losses of the samples, ``(R,)``.

    Args:
        model: The model, wrapped or not.
        anatomy: Its anatomy.
        inputs: What it is called with.
        labels: ``(R, ...)``.
        synchronized: As in `call`.

    Raises:
        ValueError: As `call`, and if a CTC model gets no mapping.
    """
    if anatomy.task != "ctc":
        return call(model, inputs, synchronized=synchronized)
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"Expected a mapping with the arguments of {type(anatomy.core).__name__}, whose CTC loss is its own, got "
            f"{type(inputs).__name__}. Have the loader return a dict."
        )
    config: Any = anatomy.core.config
    reduction, config.ctc_loss_reduction = config.ctc_loss_reduction, "none"
    try:
        output = run(model, {**inputs, pools.LABELS_KEY: labels}, synchronized=synchronized)
    finally:
        config.ctc_loss_reduction = reduction
    targets = (labels >= 0) & (labels != config.pad_token_id)  # the blank is no target
    weights = 1 / targets.sum(dim=1).clamp(min=1) if reduction == "mean" else 1.0
    loss: Tensor = named_output(output, "loss") * weights
    return loss


def run(model: nn.Module, inputs: Any, *, synchronized: bool = False, cache: bool = False) -> Any:
    """The model's own output; arguments as in `call`, and the inputs may contain labels.

    With ``cache`` the model's config decides on a KV cache, as in a training loop.
    """
    runnable = model
    wrapped = cast(nn.Module, model._modules.get("_forward_module", model))  # inside Fabric's wrapper
    if not synchronized and isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # Its forward would broadcast buffers and wait for a backward pass that never happens.
        runnable = wrapped.module
    if not isinstance(inputs, Mapping):
        return runnable(inputs)
    quiet = {name: value for name, value in _quiet_arguments(unwrap(model)).items() if not (cache and name == _CACHE)}
    return runnable(**{**inputs, **quiet})


def inputs_and_labels(anatomy: Anatomy, batch: Any) -> tuple[Any, Tensor]:
    """A batch in two parts, as of `pools.inputs_and_labels`, the first one completed by `model_inputs`."""
    inputs, labels = pools.inputs_and_labels(batch, anatomy.labels)
    return model_inputs(anatomy, inputs, labels), labels


def model_inputs(anatomy: Anatomy, inputs: Any, labels: Tensor | None) -> Any:
    """What a model is called with where it is not given its labels.

    An encoder-decoder makes its decoder's inputs of its labels; here they are made as it does. Where that fails, inputs
    stay as they are, and the model says what it lacks.

    Args:
        anatomy: The model's.
        inputs: What came without the labels.
        labels: ``(R, T)`` in a task over tokens; None leaves inputs as they are.
    """
    if labels is None or anatomy.task != "seq2seq_lm" or not isinstance(inputs, Mapping) or _DECODED & inputs.keys():
        return inputs
    made_by_model = getattr(anatomy.core, "prepare_decoder_input_ids_from_labels", None)
    make = made_by_model or partial(_shifted_right, getattr(anatomy.core, "config", None))
    with suppress(Exception):  # configs may lack the tokens, and models refuse in many ways
        return {**inputs, "decoder_input_ids": make(labels)}
    return inputs


def _shifted_right(config: Any, labels: Tensor) -> Tensor:
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORED_LABEL, config.pad_token_id)


class ExitHead(nn.Module):
    """A norm and a small residual layer after the exit, for models whose shared head ranks poorly there.

    ``exit_head(h) = norm(h + down(gelu(up(h))))``; ``down`` starts at zero, so initially it is only a norm.

    Train it on detached features with its own optimizer (pass both to `Sifter`), or jointly with the model (add
    `Sifter.exit_loss` to the loss). It belongs to the sifter, never to the model.

    Args:
        width: D, the width of the model's states.
        hidden: Width of the residual layer; 0 means only the norm.
        seed: Seed of the initial weights; the global random state is not used.

    Example:
        >>> ExitHead(8, hidden=4)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])

    Reference:
        Norm and MLP exits: Chen et al., EE-LLM, 2023, arXiv 2312.04916.
    """

    def __init__(self, width: int, *, hidden: int = 0, seed: int = 0) -> None:
        super().__init__()
        if not (isinstance(width, int) and isinstance(hidden, int) and width > 0 and hidden >= 0):
            raise ValueError(f"Expected whole numbers, width >= 1 and hidden >= 0, got {width!r} and {hidden!r}.")
        self.norm = nn.LayerNorm(width)
        self.up: nn.Linear | None = None
        if hidden:
            # Default initialisation would draw from the global generator.
            self.up = cast(nn.Linear, nn.utils.skip_init(nn.Linear, width, hidden))  # type: ignore[no-untyped-call]
            self.down = cast(nn.Linear, nn.utils.skip_init(nn.Linear, hidden, width))  # type: ignore[no-untyped-call]
            nn.init.normal_(self.up.weight, std=width**-0.5, generator=torch.Generator().manual_seed(seed))
            for zero in (self.up.bias, self.down.weight, self.down.bias):
                nn.init.zeros_(zero)

    def forward(self, states: Tensor) -> Tensor:
        """States ``(..., D)`` to states ``(..., D)``."""
        if self.up is not None:
            states = states + self.down(nn.functional.gelu(self.up(states)))
        return cast(Tensor, self.norm(states))


class Recorder(nn.Module):
    """Follows the layer at an exit like an `ExitHead`, keeps its output as ``states``, and hands it on.

    Args:
        handed_on: Shape ``(...)`` of zeros that are handed on instead, ``(R, ...)``: for an exit whose states have
            another shape than the model's head reads.
    """

    def __init__(self, handed_on: torch.Size | None = None) -> None:
        super().__init__()
        self.handed_on = handed_on
        self.states: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """The states, or zeros."""
        self.states = states
        return states if self.handed_on is None else states.new_zeros(len(states), *self.handed_on)


def _attribute_of_replaced(module: nn.Module, name: str) -> Any:
    # Models read attributes of their layers and heads (attention type, dtype of weights), so stand-ins forward them.
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        return getattr(module._modules["replaced"], name)


class _Identity(nn.Module):
    """Replaces a head module and returns its input."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.replaced = replaced

    __getattr__ = _attribute_of_replaced

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


class _AtPositions(nn.Module):
    """Replaces a position-wise module and calls it with the states of some positions, ``(1, N, D)``.

    The first module of a chain gathers these states, and the last one scatters the output.
    """

    def __init__(
        self, module: nn.Module, positions: Tensor, shape: torch.Size, *, gathers: bool, scatters: bool
    ) -> None:
        super().__init__()
        self.module = module
        self.positions = positions
        self.shape = shape
        self.gathers = gathers
        self.scatters = scatters

    def forward(self, *states: Tensor) -> Tensor:
        output = cast(Tensor, self.module(*map(self._gathered, states) if self.gathers else states))
        if not self.scatters:
            return output
        rows, length = self.shape
        zeros = output.new_zeros(rows * length, output.size(-1))
        return zeros.index_copy(0, self.positions, output[0]).view(rows, length, -1)

    def _gathered(self, states: Tensor) -> Tensor:
        if states.shape[:2] != self.shape:
            raise ValueError(
                f"Expected labels {tuple(states.shape[:2])}, one per position of the model's states, got "
                f"{tuple(self.shape)}. Give one label per position, -100 where there is none."
            )
        return states.flatten(0, 1).index_select(0, self.positions).unsqueeze(0)


class _Recorded(nn.Module):
    """Replaces a layer in the layer list and returns an earlier output of that layer."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self.replaced = layer
        self.output = output

    __getattr__ = _attribute_of_replaced

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _ExitLayer(nn.Module):
    """Replaces the last remaining layer in the layer list: that layer followed by the exit head."""

    def __init__(self, layer: nn.Module, exit_head: nn.Module, detach: bool) -> None:
        super().__init__()
        self.replaced = layer
        self.exit_head = exit_head
        self.detach = detach

    __getattr__ = _attribute_of_replaced

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.replaced(*args, **kwargs)
        states = states_of(output)
        states = self.exit_head(states.detach() if self.detach else states)
        rest = output[1:] if isinstance(output, tuple) else ()
        return (states, *rest) if isinstance(output, tuple) else states


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


def _quiet_arguments(core: nn.Module) -> dict[str, bool]:
    config = getattr(core, "config", None)
    requested = (
        [name for name, value in vars(config).items() if name.startswith("output_") and value is True] if config else []
    )
    if getattr(config, _CACHE, False):
        requested.append(_CACHE)
    parameters = inspect.signature(core.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: False for name in requested if open_ended or name in parameters}


_CAPTURE_FLAG = "_output_capturing_hooks_installed"


def _modules_with_capture_hooks(core: nn.Module) -> list[nn.Module]:
    return [module for module in core.modules() if _CAPTURE_FLAG in vars(module)]


def _drop_new_capture_hooks(core: nn.Module, hooked: list[nn.Module]) -> None:
    # transformers 5 hooks all layers when hidden states are first requested. If the model is shortened at that time,
    # the other layers never get hooks and later captures are incomplete. Without any, the next request adds all.
    if len(_modules_with_capture_hooks(core)) == len(hooked):
        return
    for module in core.modules():
        vars(module).pop(_CAPTURE_FLAG, None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
