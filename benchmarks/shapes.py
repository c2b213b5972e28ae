"""The models that benchmarks run on, as rows of data, and random inputs for them."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from earlysift import checkup, presets


@dataclass(frozen=True)
class Shape:
    """A transformers config, b for two CPU cores (give ``--batch`` on a GPU), and positions per sample.

    Images have as many positions as they have patches: their length is None.
    """

    config: dict[str, Any]
    batch: int
    length: int | None = None


# Without dropout, so that two ways of computing one loss can be compared; a few per cent of a step on a GPU.
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

SHAPES: dict[str, Shape] = {
    "bert-base-128": Shape(presets.BUILT_IN["bert-base"] | _BERT, 8, 128),
    "bert-base-512": Shape(presets.BUILT_IN["bert-base"] | _BERT, 2, 512),
    "bert-mini-128": Shape(presets.BUILT_IN["bert-mini"] | _BERT, 16, 128),
    "gpt2-small-512": Shape(presets.BUILT_IN["gpt2-small"] | _GPT2, 2, 512),
    "llama-160m-512": Shape(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32_000,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 2048,
        },
        2,
        512,
    ),
    "vit-small-224": Shape(
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "num_labels": 1000,
            **_BERT,
        },
        8,
    ),
}

_TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "num_labels": 5,
}
_TINY_BATCH, _TINY_LENGTH = 4, 16


def tiny(shape: Shape) -> Shape:
    """The same kind of model, as small as a smoke test wants it."""
    known = transformers.CONFIG_MAPPING[shape.config["model_type"]]()
    changes = {name: value for name, value in _TINY.items() if hasattr(known, name)}
    return Shape(shape.config | changes, _TINY_BATCH, shape.length and _TINY_LENGTH)


def entries(
    measure: Callable[[Shape, str, int], dict[str, Any]], given: Namespace
) -> dict[str, partial[dict[str, Any]]]:
    """A measurement for every shape and dtype that the command line asks for, by name of its entry."""
    return {
        f"{name}, b {shape.batch}, {dtype}": partial(measure, shape, dtype, given.rounds)
        for name, shape in chosen(given).items()
        for dtype in given.dtype
    }


def chosen(given: Namespace) -> dict[str, Shape]:
    """The shapes that the command line asks for: tiny, or with another b."""
    shapes = {name: tiny(SHAPES[name]) if given.smoke else SHAPES[name] for name in given.shape}
    return {name: dataclasses.replace(shape, batch=given.batch or shape.batch) for name, shape in shapes.items()}


def build(shape: Shape) -> nn.Module:
    """The model with random weights, always the same, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = transformers.CONFIG_MAPPING[shape.config["model_type"]].from_dict(shape.config)
        model: nn.Module = getattr(transformers, shape.config["architectures"][0])(config)
    return model.train()


def pool(model: nn.Module, shape: Shape, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Random inputs and labels: 15 % of the positions in masked language modelling, all in causal."""
    return checkup.random_pool(model, rows, length=shape.length, labelled_fraction=None, device=device)
