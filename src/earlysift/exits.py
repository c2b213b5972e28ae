"""Early exits of the model itself: context managers that leave parts of it out, and what follows an exit.

`truncated` shortens the layer list in place and always restores it. The model's own forward does the rest, in every
precision, wrapped or compiled. A copy of the model would look cleaner but is wrong: with a forward bound to the
instance (accelerate's mixed precision, ``model.compile()``) it silently runs all layers.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from earlysift import passes
from earlysift.anatomy import Anatomy, find_anatomy, is_compiled, wrapping
from earlysift.families import Family

_CAPTURE_FLAG = "_output_capturing_hooks_installed"


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
    return bool(anatomy.positionwise) and not (is_compiled(wrapping(model)) and max_positions is None)


def shapes_of_states(model: nn.Module, anatomy: Anatomy, inputs: Any) -> list[torch.Size]:
    """Shape of the states of a sample behind every layer, by a full pass of these inputs."""
    with (
        torch.no_grad(),
        passes.uncompiled(),
        passes.scoring_mode(model),
        captured(anatomy, len(anatomy.layers)) as outputs,
    ):
        passes.run(model, inputs)
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
