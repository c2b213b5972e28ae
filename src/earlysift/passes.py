"""Forward passes of a model, whole or shortened: what it is called with, and what it returns.

They neither cache nor capture, whatever the model's config asks for, and leave wrappers that wait for a backward pass.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from earlysift import pools
from earlysift.anatomy import Anatomy, unwrap
from earlysift.measures import IGNORED_LABEL

_CACHE = "use_cache"
_DECODED = {"decoder_input_ids", "decoder_inputs_embeds"}


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


def head_of(anatomy: Anatomy) -> Callable[[Tensor], Tensor]:
    """The model's head as one function from states ``(n, D)`` to logits ``(n, V)``."""
    modules = [anatomy.core.get_submodule(name) for name in anatomy.head]

    def head(states: Tensor) -> Tensor:
        for module in modules:
            states = module(states)
        return states

    return head


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
