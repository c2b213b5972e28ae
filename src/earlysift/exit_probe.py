"""`ExitProbe`: a small model of its own at an early exit, trained on features that scoring or training just computed.

The shared head knows little about the states of an early layer. A probe learns to read them: for classification an MLP
on the first state and the mean of the others, for language models a low-rank layer in front of the shared head. It
belongs to the sifter; neither the model nor its gradients are touched, and no layer runs a second time.
"""

import copy
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from earlysift.exits import ExitHead
from earlysift.options import whole
from earlysift.seeds import seeded

Kind = Literal["classifier", "adapter"]

HIDDEN = 64  # width of the hidden layer
LEARNING_RATE = 2e-3  # constant: a probe follows a model that changes
ADAPTER_SHARE = 32  # an adapter is trained on one row of so many, as its gradient passes through the shared head


class ExitProbe:
    """A probe and its optimizer; built when the first pool has shown how wide the states are.

    Args:
        seed: Seed of its initial weights; the global random state is not used.

    Example:
        >>> probe = ExitProbe()
        >>> states, labels = torch.randn(6, 3, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> logits = probe.classify(features(states), classes=3)
        >>> probe.propose(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        >>> probe.learn()

    Reference:
        Probes: Alain and Bengio, Understanding intermediate layers using linear classifier probes, 2016, arXiv
        1610.01644. Training one on all scored rows, as a score, is ours.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._shape: tuple[Kind, int, int] | None = None  # what it is, width of its input, number of its outputs
        self._module: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._gradients: tuple[Tensor, ...] | None = None
        self._loaded: dict[str, Any] = {}  # a saved state, until a pool shows on which device it goes on

    @property
    def is_taught(self) -> bool:
        """Whether it has begun to learn."""
        return self._module is not None or bool(self._loaded)

    def classify(self, inputs: Tensor, *, classes: int) -> Tensor:
        """Logits ``(R, classes)`` of features ``(R, F)``; differentiable in the probe's own weights."""
        logits: Tensor = self._at(("classifier", inputs.size(-1), classes), inputs.device)(inputs.float())
        return logits

    def adapt(self, states: Tensor) -> Tensor:
        """States ``(n, D)`` as the shared head reads them better, ``(n, D)``, of the same dtype."""
        width = states.size(-1)
        return cast(Tensor, self._at(("adapter", width, width), states.device)(states.float())).to(states.dtype)

    def propose(self, losses: Tensor) -> None:
        """Take the gradient of the mean of losses ``(n,)``, for `learn`; what is not finite is left out."""
        assert self._module is not None
        usable = torch.isfinite(losses)
        mean = torch.where(usable, losses, 0.0).sum() / usable.sum().clamp(min=1)
        gradients = torch.autograd.grad(mean, tuple(self._module.parameters()))
        finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite().all()
        self._gradients = tuple(torch.where(finite, gradient, 0.0) for gradient in gradients)

    def learn(self) -> None:
        """One step of the optimizer by the latest gradient."""
        if self._gradients is None:
            return
        assert self._module is not None
        assert self._optimizer is not None
        for parameter, gradient in zip(self._module.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._gradients = None

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer, as copies; empty before the first pool."""
        if self._module is None or self._optimizer is None or self._shape is None:
            return copy.deepcopy(self._loaded)
        state = {"module": self._module.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {"shape": list(self._shape), **copy.deepcopy(state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; `state_problems` has found nothing wrong with it."""
        self._shape = self._module = self._optimizer = self._gradients = None
        self._loaded = copy.deepcopy(dict(state))

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        if state == {}:
            return []
        if not isinstance(state, Mapping) or state.keys() != {"shape", "module", "optimizer"}:
            return ["probe must hold shape, module and optimizer"]
        shape = state["shape"]
        sound = isinstance(shape, list | tuple) and len(shape) == 3 and shape[0] in ("classifier", "adapter")
        if not sound or not all(whole(size, 1) for size in shape[1:]):
            return [f"probe.shape must be a kind and two sizes, got {reprlib.repr(shape)}"]
        trial = ExitProbe(self._seed)
        trial.load_state_dict(state)
        try:
            tensors = [*state["module"].values()]
            if [tensors[0].numel(), tensors[-1].numel()] != list(shape[1:]):
                return [f"probe.shape {list(shape)} must be that of its module"]
            module = trial._at(tuple(shape), tensors[0].device)
            if not trial._moments_fit():  # the optimizer would read past their ends
                return ["probe.optimizer must hold moments of the shape of the module's weights"]
            trial._gradients = tuple(map(torch.zeros_like, module.parameters()))
            trial.learn()
        except Exception as error:  # modules and optimizers refuse in many ways
            return [f"probe cannot be loaded ({error!r:.120})"]
        return []

    def _at(self, shape: tuple[Kind, int, int], device: torch.device) -> nn.Module:
        if self._module is None or self._shape != shape:  # a model whose states changed their width begins anew
            kind, width, outputs = shape
            if kind == "classifier":
                module: nn.Module = _classifier(width, outputs, self._seed)
            else:
                module = ExitHead(width, hidden=HIDDEN, seed=self._seed)
            self._shape, self._module = shape, module.to(device)
            self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=LEARNING_RATE, fused=True)
            if self._loaded and tuple(self._loaded["shape"]) == shape:
                self._module.load_state_dict(self._loaded["module"])
                saved = self._loaded["optimizer"]  # in JSON, numbers of parameters are text
                moments = {int(number): part for number, part in saved["state"].items()}
                self._optimizer.load_state_dict({**saved, "state": moments})
            self._loaded = {}
        return self._module

    def _moments_fit(self) -> bool:
        assert self._optimizer is not None
        return all(
            isinstance(moment, Tensor) and moment.shape == (() if name == "step" else parameter.shape)
            for parameter, moments in self._optimizer.state.items()
            for name, moment in moments.items()
        )


def features(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a classifier reads of the states at an exit: the first state (``[CLS]``), and the mean of the others.

    Args:
        states: ``(R, T, D)``, ``(R, D)``, or of images ``(R, D, H, W)``.
        mask: 1 at the positions that count, ``(R, T)``; None counts all.

    Returns:
        float32 ``(R, 2 D)``, or ``(R, D)`` where there are no positions.

    Example:
        >>> features(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[1., 2.]])
    """
    states = states.float()
    if states.ndim == 4:
        return states.mean(dim=(2, 3))
    if states.ndim == 2:
        return states
    counted = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    first = torch.arange(len(states), device=states.device), counted.argmax(dim=1)  # behind padding on the left
    others = counted.index_put(first, counted.new_zeros(()))
    means = (states * others[..., None]).sum(dim=1) / others.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.cat([states[first], means], dim=1)


def _classifier(width: int, outputs: int, seed: int) -> nn.Module:
    generator = seeded(seed, "exit probe")
    linears = [
        cast(nn.Linear, nn.utils.skip_init(nn.Linear, *sizes))  # type: ignore[no-untyped-call]
        for sizes in ((width, HIDDEN), (HIDDEN, outputs))
    ]
    for linear in linears:  # default initialisation would draw from the global generator
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), linears[0], nn.GELU(), linears[1])
