"""Models of the transformers library, built from configs with random weights: no downloads."""

import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from earlysift.anatomy import unwrap
from earlysift.checkup import build_model
from earlysift.files import write_whole
from earlysift.presets import read_config
from earlysift.pretrain.optional import optional_package

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_PRETRAINED = ("ForMaskedLM", "ForPreTraining")  # classes whose encoder is saved


def build_bert(*, vocab_size: int, length: int, layers: int, width: int, seed: int) -> nn.Module:
    """A BERT for masked language modelling with weights from a seed; the global generator is not touched.

    Heads have width 32 in models below width 512, else 64, as in BERT base (width 768, 12 layers: 110 M parameters with
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
    transformers = optional_package("transformers", extra="hf")
    config = transformers.BertConfig(
        vocab_size=vocab_size, max_position_embeddings=max(length, 8), **_bert(layers, width)
    )
    return _seeded_model(lambda: transformers.BertForMaskedLM(config), seed)


def build_modernbert(*, vocab_size: int, length: int, layers: int, width: int, seed: int) -> nn.Module:
    """A ModernBERT for masked language modelling; arguments as in `build_bert`.

    Its norms stand before the layers, its positions are rotary, and every layer attends to all positions.
    """
    transformers = optional_package("transformers", extra="hf")
    heads = width // _head_width(width)
    config = transformers.ModernBertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max(length, 8),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=32 * math.ceil(width / 12),  # gated, so as many weights as in an MLP four times as wide
        global_attn_every_n_layers=1,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), None),
    )
    return _seeded_model(lambda: transformers.ModernBertForMaskedLM(config), seed)


def build_llama(*, vocab_size: int, length: int, layers: int, width: int, seed: int) -> nn.Module:
    """A Llama for causal language modelling; arguments as in `build_bert`. Input and output embeddings are tied."""
    transformers = optional_package("transformers", extra="hf")
    heads = width // _head_width(width)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=length,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=32 * math.ceil(width / 12),  # 8/3 of the width, rounded up to a multiple of 32
        tie_word_embeddings=True,
    )
    return _seeded_model(lambda: transformers.LlamaForCausalLM(config), seed)


def build_bert_classifier(
    *, classes: int, vocab_size: int, length: int, layers: int, width: int, seed: int
) -> nn.Module:
    """A BERT to classify texts into a number of ``classes``; other arguments as in `build_bert`."""
    transformers = optional_package("transformers", extra="hf")
    config = transformers.BertConfig(
        num_labels=classes, vocab_size=vocab_size, max_position_embeddings=max(length, 8), **_bert(layers, width)
    )
    return _seeded_model(lambda: transformers.BertForSequenceClassification(config), seed)


def build_fine_tuned(
    checkpoint: Path, *, classes: int, vocab_size: int, length: int, layers: int, width: int, seed: int
) -> nn.Module:
    """A classifier that starts from a saved encoder; all of its head comes from the seed, a pooler included.

    Args:
        checkpoint: A folder of `save_encoder`.
        classes: Number of classes.
        vocab_size: V, at most the encoder's.
        length: Longest input, at most the encoder's.
        layers: Layers of the encoder.
        width: Its width.
        seed: Seed of the new weights.

    Raises:
        ValueError: If the checkpoint is no encoder of this shape.
        FileNotFoundError: If the checkpoint is incomplete.
    """
    require_checkpoint(checkpoint)
    saved = read_config(str(checkpoint))
    without_dropout = {name: 0.0 for name, value in saved.items() if "dropout" in name and isinstance(value, float)}
    changes = {**without_dropout, "num_labels": classes, "problem_type": None}
    model = _seeded_model(lambda: build_model(str(checkpoint), "sequence_classification", changes), seed)
    wanted = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "vocab_size": vocab_size,
        "max_position_embeddings": max(length, 8),
    }
    _require_shape(checkpoint, model.config, wanted)
    _load_encoder(model, checkpoint)
    return model


def build_vit(*, size: int, channels: int, patch: int, classes: int, layers: int, width: int, seed: int) -> nn.Module:
    """A ViT to classify square images ``(R, channels, size, size)``; layers, width and seed as in `build_bert`.

    ``size`` and ``patch`` are the sides of an image and of a patch in pixels; the first is a multiple of the second.
    """
    transformers = optional_package("transformers", extra="hf")
    config = transformers.ViTConfig(
        image_size=size, patch_size=patch, num_channels=channels, num_labels=classes, **_bert(layers, width)
    )
    return _seeded_model(lambda: transformers.ViTForImageClassification(config), seed)


def build_preset(source: str, *, changes: Mapping[str, Any], seed: int) -> nn.Module:
    """A model from a built-in name or a transformers config, with weights from a seed.

    Args:
        source: What `earlysift.checkup.build_model` takes.
        changes: Values that replace those of the config.
        seed: Seed of the weights.

    Raises:
        ValueError: If there is no such model.
    """
    return _seeded_model(lambda: build_model(source, changes=changes), seed)


def save_encoder(model: nn.Module, tokenizer_json: str, folder: Path) -> None:
    """Save a masked language model without its head, for fine-tuning: config.json, model.safetensors, tokenizer.json.

    Args:
        model: A BERT from `build_bert`, or another masked language model of transformers, wrapped or not.
        tokenizer_json: Its tokenizer (`Blocks.tokenizer_json`).
        folder: Where to save; made if it does not exist.

    Raises:
        ValueError: If the model is no masked language model.
    """
    core: Any = unwrap(model)
    if not any(kind.__name__.endswith(_PRETRAINED) for kind in type(core).__mro__):
        raise ValueError(f"Expected a masked language model of transformers, got {type(core).__name__}.")
    encoder = {name: value.contiguous() for name, value in core.state_dict().items() if name.startswith(_prefix(core))}
    safetensors = optional_package("safetensors.torch", extra="hf")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, core.config.to_json_file)
    write_whole(folder / TOKENIZER, lambda part: part.write_text(tokenizer_json, encoding="utf-8"))
    write_whole(folder / WEIGHTS, lambda part: safetensors.save_file(encoder, part, metadata={"format": "pt"}))


def require_checkpoint(folder: Path) -> None:
    """Check that a folder is one of `save_encoder`.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: expected a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}, but {', '.join(missing)} "
            "is not there; save_encoder writes such a folder after a masked-LM run"
        )


def _require_shape(checkpoint: Path, config: Any, wanted: Mapping[str, int]) -> None:
    """Raise unless the config of a checkpoint fits the requested shape."""
    at_least = ("vocab_size", "max_position_embeddings")
    has = {name: getattr(config, name, 0) for name in wanted}
    differing = [
        f"{name} is {has[name]} and not {value}"
        for name, value in wanted.items()
        if not (operator.ge if name in at_least else operator.eq)(has[name], value)
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: the checkpoint has another shape: {', '.join(differing)}; ask for the same shape"
        )


def _load_encoder(model: nn.Module, checkpoint: Path) -> None:
    safetensors = optional_package("safetensors.torch", extra="hf")
    prefix = _prefix(model)
    saved = safetensors.load_file(checkpoint / WEIGHTS)
    encoder = {name: value for name, value in saved.items() if name.startswith(prefix)}
    not_loaded = model.load_state_dict(encoder, strict=False).missing_keys
    missing = [name for name in not_loaded if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")]
    if missing:
        raise ValueError(
            f"{checkpoint}: expected the weights of an encoder, named {prefix}*, but {missing[0]} is missing"
        )


def _prefix(model: Any) -> str:
    """What the names of all weights begin with, but those of the head."""
    return f"{model.base_model_prefix}."


def _head_width(width: int) -> int:
    head_width = 64 if width >= 512 else 32
    if width % head_width:
        raise ValueError(f"width must be a multiple of {head_width} (the width of an attention head), got {width}.")
    return head_width


def _bert(layers: int, width: int) -> dict[str, Any]:
    """The shape of BERT and of ViT, which shares it."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _head_width(width),
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _seeded_model(make: Callable[[], Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerator as well
        model = make()
    assert isinstance(model, nn.Module)
    return model.train()
