"""Tiny random models of every family and task, and batches for them.

Weights are drawn wide (and norms and biases off their usual ones and zeros), so that a cut model, a wrong head or a
left-out norm shows in the loss. Nothing here draws from the global random state.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from earlysift.families import Family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party imports may warn; tests are about what happens after them
    import transformers

torch.set_num_threads(1)  # models this small only lose by more, a lot of it on a busy machine

VOCABULARY, WIDTH, LAYERS, HEADS, CLASSES, PAD = 101, 32, 4, 4, 5, 0
TASKS = ("masked_lm", "causal_lm", "token_classification", "sequence_classification")

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROTARY = {"num_key_value_heads": 2}

# What a family's config needs besides _COMMON, and where its dropouts are.
_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": "c2p|p2c",
        "conv_kernel_size": 3,
        "position_buckets": 4,
        "max_relative_positions": 16,
    },
    "gpt2": {},
    "llama": _ROTARY,
    "qwen3": _ROTARY | {"head_dim": 8},
    "vit": {"image_size": 8, "patch_size": 2, "num_channels": 1},
}
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "pooler_dropout",
    "summary_last_dropout",
)
_CLASSES_OF_FAMILY = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "modernbert": "ModernBert",
    "deberta-v2": "DebertaV2",
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen3": "Qwen3",
    "vit": "ViT",
}
_CAUSAL = ("gpt2", "llama", "qwen3")
_SUFFIXES = {
    "masked_lm": "ForMaskedLM",
    "causal_lm": "ForCausalLM",
    "token_classification": "ForTokenClassification",
    "sequence_classification": "ForSequenceClassification",
    "question_answering": "ForQuestionAnswering",
}
_OTHER_SUFFIXES = {
    ("gpt2", "causal_lm"): "LMHeadModel",
    ("vit", "sequence_classification"): "ForImageClassification",
}


class Block(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, HEADS, dropout=dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Dropout(dropout), nn.Linear(48, width)
        )

    def forward(self, states: Tensor, ignored: Tensor | None, causal: Tensor | None) -> Tensor:
        normed = self.norm(states)
        attended, _ = self.attention(
            normed, normed, normed, key_padding_mask=ignored, attn_mask=causal, need_weights=False
        )
        states = states + attended
        return states + self.feed_forward(states)


class PlainTransformer(nn.Module):
    """A Transformer as users write it: no config, no output class; takes token ids, or features ``(R, T, D)``."""

    def __init__(self, task: str, *, layers: int = LAYERS, dropout: float = 0.0, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.task = task
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.zeros(64, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, dropout) for _ in range(layers))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY if task.endswith("lm") else CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = input_ids if input_ids.is_floating_point() else self.embed(input_ids)
        length = states.size(1)
        states = states + self.place[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        for block in self.blocks:
            states = block(
                states,
                None if attention_mask is None else attention_mask == 0,
                causal if "causal" in self.task else None,
            )
        if isinstance(self.norm, nn.BatchNorm1d):
            states = self.norm(states.transpose(1, 2)).transpose(1, 2)
        else:
            states = self.norm(states)
        return self.head(states.mean(dim=1) if self.task == "sequence_classification" else states)


class Rung(nn.Module):
    """A layer that changes its states but little."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, states: Tensor) -> Tensor:
        return states + 0.1 * torch.tanh(self.linear(states))


class Ladder(nn.Module):
    """Features ``(R, 16)`` to two classes, through four layers whose exits see much the same.

    It knows from the start that the last feature tells the class (see `mostly_learnt`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Rung() for _ in range(4))
        self.head = nn.Linear(16, 2)

    def forward(self, states: Tensor) -> Tensor:
        for rung in self.rungs:
            states = rung(states)
        return self.head(states)


LADDER = Family("rungs", (("head",),), "sequence_classification")


def ladder() -> nn.Module:
    """A ladder, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Ladder()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, -1] = torch.tensor([-1.0, 1.0])
        model.head.bias.zero_()
    return model.train()


def mostly_learnt(generator: Generator, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Six of seven samples are copies of what a ladder knows; in the others the first feature tells the class."""
    labels = torch.randint(2, (rows,), generator=generator)
    sign = 2.0 * labels - 1
    new = torch.randn(rows, 16, generator=generator)
    new[:, 0] = sign * new[:, 0].abs()
    new[:, -1] = 0
    known = torch.zeros(rows, 16)
    known[:, -1] = 4 * sign
    return torch.where(torch.rand(rows, 1, generator=generator) < 6 / 7, known, new), labels


def unlearnable(generator: Generator, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Labels that nothing tells, and nothing that a ladder knows."""
    features = torch.randn(rows, 16, generator=generator)
    features[:, -1] = 0
    return features, torch.randint(2, (rows,), generator=generator)


def widen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, wide enough that every part of the model shows in its loss."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.2 * noise)
    return model


def build(
    family: str, task: str, *, layers: int = LAYERS, dropout: float = 0.0, seed: int = 0, **config: Any
) -> nn.Module:
    """A model of a family for a task, in training mode."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if family == "plain":
            return widen(PlainTransformer(task, layers=layers, dropout=dropout, **config), seed).train()
        name = _CLASSES_OF_FAMILY[family]
        suffix = _OTHER_SUFFIXES.get((family, task), _SUFFIXES[task])
        values = _COMMON | {"num_labels": CLASSES} | _CONFIGS[family] | {"num_hidden_layers": layers} | config
        made = getattr(transformers, f"{name}Config")(**values)
        for dropout_name in _DROPOUTS:
            if dropout_name == "classifier_dropout" or isinstance(getattr(made, dropout_name, None), float):
                setattr(made, dropout_name, dropout)
        return widen(getattr(transformers, name + suffix)(made), seed).train()


def _tasks_of(family: str) -> tuple[str, ...]:
    if family == "plain":
        return TASKS
    if family == "vit":
        return ("sequence_classification",)
    return ("causal_lm" if family in _CAUSAL else "masked_lm", "token_classification", "sequence_classification")


BUILDERS: dict[tuple[str, str], Callable[..., nn.Module]] = {
    (family, task): partial(build, family, task) for family in (*_CONFIGS, "plain") for task in _tasks_of(family)
}


def task_of(model: nn.Module) -> str:
    """The task that the model was built for."""
    if isinstance(model, PlainTransformer):
        return model.task
    suffixes = [*_SUFFIXES.items(), *((task, suffix) for (_, task), suffix in _OTHER_SUFFIXES.items())]
    return next(task for task, suffix in suffixes if type(model).__name__.endswith(suffix))


def row_of(model: nn.Module) -> Family | None:
    """The family row to pass along with the model: None where the library knows the family."""
    return Family("blocks", (("head",),), task_of(model)) if isinstance(model, PlainTransformer) else None


def shorter(model: nn.Module, depth: int) -> nn.Module:
    """A model of the same class that really has ``depth`` layers, with copies of the same weights."""
    if isinstance(model, PlainTransformer):
        short = build("plain", model.task, layers=depth, norm=type(model.norm))
    else:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
        with torch.random.fork_rng(devices=[]):
            short = type(model)(config)
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in model.parameters())
    weights = model.state_dict()
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    return short.train(model.training)


def batch_for(model: nn.Module, task: str, rows: int, length: int, generator: Generator) -> dict[str, Tensor]:
    """Token ids with padding on the right, and labels of which a part is ignored; or images for a model of those.

    Lengths of the samples vary, the first one has no padding; every sample has at least one labelled position.
    """

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if model.__class__.__name__.startswith("ViT"):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator), "labels": draw(0, CLASSES, rows)}
    lengths = draw(length // 2, length + 1, rows)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    inputs = torch.where(mask == 1, draw(3, VOCABULARY, rows, length), PAD)
    if task == "sequence_classification":
        return {"input_ids": inputs, "attention_mask": mask, "labels": draw(0, CLASSES, rows)}
    if task == "causal_lm":
        labels = inputs.clone()
        ignored = mask == 0
        ignored[:, : length // 4] |= draw(0, 2, rows, 1) == 1  # a prompt without loss in some rows
    else:
        labels = draw(0, VOCABULARY if task == "masked_lm" else CLASSES, rows, length)
        ignored = (mask == 0) | (draw(0, 3, rows, length) > 0)
        ignored[:, 1] = False
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels.masked_fill(ignored, -100)}


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned."""
    return output if isinstance(output, Tensor) else output.logits


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a training step as users write it: the model's own where it has one."""
    if not isinstance(model, PlainTransformer):
        return model(**batch).loss
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs), batch["labels"]
    if model.task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss of every sample from the full logits of the model: mean cross entropy over its labelled positions."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = logits_of(model(**inputs)).float()
    labels, task = batch["labels"], task_of(model)
    if task == "sequence_classification":
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(dim=1) / (labels != -100).sum(dim=1)


def score_by_labels(model, pool):
    """A score without a model: the mean label, nothing where there is none."""
    labels = pool["labels"]
    labelled = labels != -100
    counts = labelled.sum(dim=1)
    means = torch.where(labelled, labels, 0).sum(dim=1) / counts.clamp(min=1)
    return torch.where(counts > 0, means, -torch.inf)


def observed_on_rank(rank, step):
    """Ids that one of several ranks asks for, and the losses of the first few of them; numbers differ between ranks."""
    generator = torch.Generator().manual_seed(3000 * step + rank)
    ids = torch.randint(0, 40 + 5 * step, (7 + (rank + step) % 3,), generator=generator)
    losses = torch.rand(3 + (rank + 2 * step) % 4, generator=generator)
    losses[step % 3] = [0.5, float("nan"), float("inf"), -float("inf")][(step + rank) % 4]
    return ids, losses


def ragged_pool_of_rank(rank, step, side, size=6):
    """Candidates of one of several ranks, padded on a side to the longest of them: lengths differ between ranks."""
    generator = torch.Generator().manual_seed(2000 * step + rank)
    lengths = torch.randint(4, 9 + 4 * ((rank + step) % 2), (size,), generator=generator)
    length = int(lengths.max())
    used = torch.arange(length) < lengths[:, None]
    used = used.flip(1) if side == "left" else used
    ids = torch.where(used, torch.randint(8, 90, (size, length), generator=generator), 7)
    return {
        "input_ids": ids,
        "attention_mask": used.long(),
        # No loss on the first token: on the left of it there may be padding, whose states depend on how much there is.
        "labels": torch.where(used & (used.cumsum(dim=1) > 1), ids, -100),
        "position_ids": (used.cumsum(dim=1) - 1).clamp(min=0),
    }


def pool_of_rank(rank, step, size):
    """Candidates of one of several ranks: nested, of several dtypes, the first without a label."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(5, 90, (size, 12), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)
    labels[0] = -100
    number = torch.arange(size)
    extra = {"number": 100 * rank + number, "odd": number % 2 == 1, "half": ids[:, :3].bfloat16()}
    return {"input_ids": ids, "labels": labels, "extra": (extra,)}


ALL = list(BUILDERS)
WITH_HEAD = [key for key in BUILDERS if key[1] != "sequence_classification"]
TRANSFORMERS = [key for key in BUILDERS if key[0] != "plain"]
FEW = [
    *(("bert", "masked_lm"), ("modernbert", "masked_lm"), ("gpt2", "causal_lm"), ("llama", "causal_lm")),
    ("plain", "masked_lm"),
]


def batch_of(model, rows=6, length=12, seed=1):
    return batch_for(model, task_of(model), rows, length, Generator().manual_seed(seed))


def inputs_of(model, **arguments):
    return {key: value for key, value in batch_of(model, **arguments).items() if key != "labels"}


def structure(model):
    """Names, identities and training flags of all modules, and the hooks on them."""
    return [
        (
            name,
            id(module),
            module.training,
            list(module._modules),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]
