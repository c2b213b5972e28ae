"""Tasks and the configs of built-in models, for the command line before it imports torch."""

import json
import reprlib
from pathlib import Path
from typing import Any, Literal

Task = Literal[
    "masked_lm",
    "causal_lm",
    "seq2seq_lm",
    "token_classification",
    "sequence_classification",
    "question_answering",
    "ctc",
]
BY_TOKEN = ("masked_lm", "causal_lm", "seq2seq_lm", "token_classification")
"""Tasks whose head predicts at every position, so that it need run at labelled ones only."""
Problem = Literal["single_label", "multi_label", "regression"]
"""What the labels of a sequence classification are."""

# Values that are not given have the defaults of transformers, which are those of the original model.
_BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
BUILT_IN: dict[str, dict[str, Any]] = {
    "bert-base": _BERT,
    "bert-small": {**_BERT, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
    "bert-mini": {**_BERT, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
    "bert-tiny": {**_BERT, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "modernbert-base": {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]},
    "gpt2-small": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    "demo": {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 4096,
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}


def read_config(source: str) -> dict[str, Any]:
    """The values of a transformers config.

    Args:
        source: A config.json, a folder that holds one, or a name in `BUILT_IN`.

    Raises:
        ValueError: If the file is no config.
        FileNotFoundError: If there is no such file.

    Example:
        >>> read_config("bert-base")["model_type"]
        'bert'
    """
    path = _file(source)
    if not path.is_file():
        if source in BUILT_IN:
            return BUILT_IN[source]
        raise FileNotFoundError(
            f"Expected a transformers config.json, a folder that holds one, or one of {', '.join(BUILT_IN)}, "
            f"found nothing at {path}. Download the config.json of your model, and give its path."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {path}: {error}. Give a transformers config.json.") from error
    if not isinstance(values, dict):
        raise ValueError(f"Expected a mapping in {path}, got {reprlib.repr(values)}.")
    return values


def require_preset(source: str) -> None:
    """Raise unless there is a model of this name.

    Raises:
        ValueError: If there is none.
    """
    if not _file(source).is_file() and source not in BUILT_IN:
        raise ValueError(
            f"Unknown preset {source!r}; known are {', '.join(BUILT_IN)}, and the path of a transformers config.json "
            "or of a folder that holds one."
        )
    read_config(source)


def _file(source: str) -> Path:
    return Path(source) / "config.json" if Path(source).is_dir() else Path(source)
