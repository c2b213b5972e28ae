"""Tiny models of many families of transformers, by name: what early exits are tried on, far beyond the known rows."""

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party imports may warn
    import transformers

VOCABULARY, LAYERS = 101, 4
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 5,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_DEEPSEEK = {
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
_SPEECH = {
    **{"conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16},
    **{"layerdrop": 0.0, "apply_spec_augment": False},  # while training, both draw from global generators
}
_SEQ2SEQ = {
    **{"d_model": 32, "encoder_attention_heads": 4, "max_source_positions": 8, "num_mel_bins": 8},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2},
}


_OF_BOTH = ("encoder_layers", "decoder_layers")
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


class Animal(NamedTuple):
    """A tiny model to try.

    Attributes:
        kind: Its automatic class: ``MaskedLM``, ``CausalLM``, ``SequenceClassification``, ``ImageClassification``,
            ``AudioClassification``, ``Seq2SeqLM`` or ``SpeechSeq2Seq``.
        config: What its config needs beside the usual sizes.
        masks: Whether it takes an attention mask.
        depths_named: How its config names the number of layers, of encoder and decoder.
    """

    kind: str
    config: Mapping[str, Any] = MappingProxyType({})
    masks: bool = True
    depths_named: tuple[str, ...] = ("num_hidden_layers",)


ZOO: dict[str, Animal] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "ernie", "data2vec-text"), Animal("MaskedLM")
    ),
    "distilbert": Animal("MaskedLM", {"hidden_dim": 48, "dim": 32, "n_heads": 4}, depths_named=("n_layers",)),
    "electra": Animal("MaskedLM", {"embedding_size": 16}),
    "deberta-v2": Animal("MaskedLM"),
    "modernbert": Animal("MaskedLM"),
    "albert": Animal("MaskedLM"),
    "gpt2": Animal("CausalLM", {"n_embd": 32, "n_head": 4}, depths_named=("n_layer",)),
    **dict.fromkeys(("gpt_neox", "phi"), Animal("CausalLM")),
    "opt": Animal("CausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    **dict.fromkeys(("falcon", "biogpt", "olmo"), Animal("CausalLM")),
    "gptj": Animal("CausalLM", {"n_embd": 32, "n_head": 4, "rotary_dim": 4}, depths_named=("n_layer",)),
    "bloom": Animal("CausalLM", {"n_head": 4}, depths_named=("n_layer",)),
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "cohere"),
            *("smollm3", "nanochat", "stablelm", "starcoder2", "glm", "glm4", "exaone4"),
        ),
        Animal("CausalLM", _GROUPED),
    ),
    "phi3": Animal("CausalLM", {"num_key_value_heads": 2}),
    "mixtral": Animal("CausalLM", _GROUPED | _EXPERTS),
    "qwen3_moe": Animal(
        "CausalLM", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "gpt_oss": Animal("CausalLM", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Animal("CausalLM", _DEEPSEEK),
    "rwkv": Animal("CausalLM", {"attention_hidden_size": 32, "context_length": 64}, masks=False),
    "mamba": Animal("CausalLM", {"state_size": 4}, masks=False),
    "mamba2": Animal(
        "CausalLM",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
        masks=False,
    ),
    "xlstm": Animal("CausalLM", {"num_heads": 4, "chunk_size": 8}, masks=False, depths_named=("num_blocks",)),
    "jamba": Animal("CausalLM", _GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "recurrent_gemma": Animal(
        "CausalLM", {"num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "attention"]}
    ),
    "mistral (classification)": Animal("SequenceClassification", _GROUPED),
    "xlm-roberta (classification)": Animal("SequenceClassification"),
    **dict.fromkeys(("vit", "beit", "dinov2"), Animal("ImageClassification", _IMAGES)),
    "deit": Animal("ImageClassification", _IMAGES | {"architectures": ["DeiTForImageClassification"]}),
    **dict.fromkeys(("clip", "siglip"), Animal("ImageClassification", {"vision_config": _IMAGES})),
    "swin": Animal(
        "ImageClassification",
        {
            **{**_IMAGES, "image_size": 64, "embed_dim": 8, "window_size": 4},
            **{"depths": [1, 1, 1, 1], "num_attention_heads": [2, 2, 2, 2]},
        },
    ),
    "convnext": Animal("ImageClassification", {"num_channels": 1, **_STAGES}),
    "resnet": Animal("ImageClassification", {"num_channels": 1, "embedding_size": 8, "layer_type": "basic", **_STAGES}),
    **dict.fromkeys(("wav2vec2", "hubert"), Animal("AudioClassification", _SPEECH)),
    **dict.fromkeys(
        ("bart", "mbart", "pegasus", "m2m_100", "marian"), Animal("Seq2SeqLM", _SEQ2SEQ, depths_named=_OF_BOTH)
    ),
    "led": Animal("Seq2SeqLM", {**_SEQ2SEQ, "attention_window": 8}, depths_named=_OF_BOTH),
    "t5": Animal(
        "Seq2SeqLM",
        {"d_model": 32, "num_heads": 4, "d_ff": 48, "d_kv": 8, "decoder_start_token_id": 0},
        depths_named=("num_layers",),
    ),
    "whisper": Animal("SpeechSeq2Seq", _SEQ2SEQ, depths_named=_OF_BOTH),
}


def build(name: str, layers: int = LAYERS) -> nn.Module:
    """A model in evaluation mode with weights from a seed; the global generator is left as it was."""
    animal = ZOO[name]
    sizes = {**_COMMON, **dict.fromkeys(animal.depths_named, layers), **animal.config}
    sizes |= {part: {**sizes, **sizes[part]} for part in ("vision_config",) if part in sizes}
    config = transformers.AutoConfig.for_model(name.partition(" ")[0], **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"AutoModelFor{animal.kind}").from_config(config)
    return model.eval()


def stock(name: str, layers: int) -> nn.Module:
    """A model of so many layers that holds the weights of the whole one."""
    model, weights = build(name, layers), build(name).state_dict()
    model.load_state_dict({key: weights[key] for key in model.state_dict()})
    return model


def batch(name: str, rows: int = 4) -> dict[str, Tensor]:
    """Inputs with labels."""
    animal, draws = ZOO[name], Generator().manual_seed(1)
    classes = torch.arange(rows) % 5
    if animal.kind == "ImageClassification":
        size = animal.config.get("vision_config", animal.config).get("image_size", 32)
        return {"pixel_values": torch.randn(rows, 1, size, size, generator=draws), "labels": classes}
    if animal.kind == "AudioClassification":
        return {"input_values": torch.randn(rows, 64, generator=draws), "labels": classes}
    tokens = torch.randint(3, VOCABULARY, (rows, 8), generator=draws)
    if animal.kind == "SpeechSeq2Seq":
        return {"input_features": torch.randn(rows, 8, 16, generator=draws), "labels": tokens}
    inputs = {"input_ids": tokens} | ({"attention_mask": torch.ones_like(tokens)} if animal.masks else {})
    if animal.kind == "Seq2SeqLM":  # as long as they are, and the rest is padding
        return {
            **inputs,
            "labels": tokens.flip(1)[:, :6].where(torch.arange(6) < torch.arange(3, 3 + rows)[:, None], -100),
        }
    return {**inputs, "labels": classes if animal.kind == "SequenceClassification" else tokens.clone()}
