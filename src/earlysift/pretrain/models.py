"""Models built from configs: real transformers classes with random weights, no downloads."""

from typing import Any

import torch
from torch import nn


def build_bert(*, vocab_size: int, length: int, layers: int, width: int, seed: int) -> nn.Module:
    """A BERT for masked language modelling with weights from a seed; the global generator is left as it was.

    Heads are 32 wide below width 512 and 64 from there, as in BERT base (width 768, 12 layers: 110 M parameters with
    a vocabulary of 30,522). Dropout is off: short runs from scratch do not overfit.

    Args:
        vocab_size: V.
        length: Longest input.
        layers: Number of layers.
        width: D; a multiple of 32.
        seed: Seed of the weights.

    Raises:
        ValueError: If the width does not divide into heads.
        ImportError: If transformers is not installed.
    """
    head_width = 64 if width >= 512 else 32
    if width % head_width:
        raise ValueError(f"width must be a multiple of {head_width} (the width of an attention head), got {width}.")
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError as error:
        raise ImportError("Building models needs transformers: pip install 'earlysift[hf]'.") from error
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        intermediate_size=4 * width,
        max_position_embeddings=max(length, 8),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BertForMaskedLM(config)
    assert isinstance(model, nn.Module)
    return model.train()
