"""How often each layer of a model runs, compiled or not."""

from contextlib import contextmanager

import torch

from earlysift.anatomy import find_anatomy
from models import LAYERS

CALLS = []


# An operator, so that compiled code counts, too, without a break in its graphs.
@torch.library.custom_op("earlysift_tests::count_call", mutates_args=())
def count_call(states: torch.Tensor, position: int) -> torch.Tensor:
    CALLS[position] += 1
    return states.clone()


count_call.register_fake(lambda states, position: torch.empty_like(states))
count_call.register_autograd(lambda context, gradient: (gradient, None))


@contextmanager
def layer_calls(model, family=None):
    """Counts how often each layer of a model runs, compiled or not."""
    layers = find_anatomy(model, family).layers
    CALLS[:] = [0] * len(layers)

    def hook_at(position):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (count_call(output[0], position), *output[1:])
            return count_call(output, position)

        return hook

    handles = [layer.register_forward_hook(hook_at(i)) for i, layer in enumerate(layers)]
    try:
        yield CALLS
    finally:
        for handle in handles:
            handle.remove()


def expected_calls(depth, times=1):
    return [times] * depth + [0] * (LAYERS - depth)
