"""What Python programs can get wrong: settings, inputs of the library, saved states."""

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from torch import Tensor, nn

import earlysift
from earlysift import Sifter, exits, losses, schedules, scorers, selectors
from earlysift.adapters.huggingface import SiftConfig, SiftTrainer
from earlysift.compare.settings import Settings
from earlysift.control import Control
from earlysift.families import Family
from earlysift.measures import LOSS
from earlysift.pretrain.settings import PretrainSettings
from earlysift.selectors import Selection
from fuzz_calls import kind_of
from fuzz_trying import Case, Lost

# Called with what their types forbid.
_family: Any = Family
_selection: Any = Selection
_schedules: Any = schedules
_losses: Any = losses
_exits: Any = exits
_new_sifter: Any = Sifter

SETTINGS, LIBRARY, STATE = "settings", "library", "state"
_VOCABULARY, _ROWS, _LENGTH, _CLASSES = 50, 8, 6, 3
_NAN = math.nan


def cases() -> list[Case]:
    """Everything that is tried from Python."""
    return [
        *_settings(),
        *_arguments(),
        *_pools(),
        *_models(),
        *_functions(),
        *_families(),
        *_parts(),
        *_states(),
        *_checkpoints(),
    ]


# Models and pools. Made when they are needed, in the process of the case.


def _small(name: str, **config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    values = {"vocab_size": _VOCABULARY, "max_position_embeddings": 32, "num_labels": _CLASSES, **sizes, **config}
    made = getattr(transformers, f"{name.partition('For')[0]}Config")(**values)
    model: nn.Module = getattr(transformers, name)(made)
    return model


def _plain() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, _CLASSES))


_PLAIN = Family("0", (("1",),), "sequence_classification")


def _pool(task: str = "masked_lm", rows: int = _ROWS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if task == "plain":
        return {"x": torch.randn(rows, 4, generator=generator), "labels": torch.arange(rows) % _CLASSES}
    ids = torch.randint(3, _VOCABULARY, (rows, _LENGTH), generator=generator)
    labels = torch.arange(rows) % _CLASSES if task == "classes" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _sifter(model: nn.Module | None = None, **arguments: Any) -> Sifter:
    return Sifter(model or _small("BertForMaskedLM"), **arguments)


def _sift(model: nn.Module | None = None, *pool: Any, **arguments: Any) -> None:
    """Build a sifter, sift twice, and train on what it gives."""
    model = model or _small("BertForMaskedLM")
    sifter = Sifter(model, **arguments)
    (given,) = pool or (_pool(),)
    for _ in range(2):
        before = _shown(sifter)
        try:
            batch = sifter.sift(given)
            sifter.judge()
        except Exception:
            if _shown(sifter) != before:
                raise Lost("the sifter's state after a pool that was refused") from None
            raise
    loss = scorers.training_loss(model, batch, family=arguments.get("family"))
    torch.autograd.backward(loss)


def _shown(sifter: Sifter) -> str:
    return repr(sifter.state_dict())


def _case(
    kind: str,
    name: str,
    act: Callable[[], Any],
    *words: str,
    refused: bool = True,
    prepare: Callable[[], None] | None = None,
) -> Case:
    return Case(kind=kind, name=name, act=act, words=words, refused=refused, prepare=prepare)


# Settings

_WRONG: dict[str, tuple[Any, ...]] = {  # by the type of a field: what it can never be
    "int": ("many", [1], _NAN, 1.5, math.inf),
    "float": ("many", [1.0], _NAN, math.inf),
    "str": (5, "nonsense"),
    "Path": (5, 1.5),
    "bool": ("maybe", 7),
}


def _settings() -> Iterator[Case]:
    """Fields of every settings class with values that they cannot have."""
    needed: dict[type, dict[str, Any]] = {Settings: {}, PretrainSettings: {}, Control: {}, SiftConfig: {}}
    for settings, base in needed.items():
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            hint = str(hints[field.name])
            if "Callable" in hint or field.name in ("family", "control", "schedule", "dtype", "select"):
                wrong: tuple[Any, ...] = (5, [1])
            else:
                wrong = _WRONG[kind_of(hints[field.name])]
            if "tuple" in hint:
                wrong = (*((value,) for value in wrong if not isinstance(value, list)), 5)
            for value in wrong:
                if value == "nonsense" and "Literal" not in hint:
                    continue
                given = {**base, field.name: value}
                act = (
                    partial(_configured, settings, given)
                    if settings in (SiftConfig, Control)
                    else partial(settings, **given)
                )
                yield _case(SETTINGS, f"{settings.__name__}({field.name}={value!r})", act, field.name)
        yield _case(SETTINGS, f"{settings.__name__}(no_such=1)", partial(settings, no_such=1), "no_such")


def _configured(kind: type, values: dict[str, Any]) -> None:
    """Settings, and what is built of them: some are looked at only there."""
    settings = kind(**values)
    options = dict(vars(settings)) if kind is SiftConfig else {"mode": "auto", "control": settings}
    _sift(**(options | {"kept": options.get("kept") or 4}))


# Arguments of the sifter

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "keep": (0, -0.5, 1.5, _NAN, math.inf, "0.5", None, [0.5]),
    "kept": (0, -1, 2.5, "4", [4], _NAN),
    "depth": (0, -1, 2, 99, 1.5, "1", None, _NAN, [1]),
    "score": ("lsos", "", None, 5, ["loss"]),
    "select": ("greedy", None, 5),
    "schedule": ("linear", 0.5, [1]),
    "mode": ("Auto", "", None, 1),
    "control": ("auto", {}, 5),
    "family": ("bert", 5, ("layers",)),
    "reduction": ("none", "", None, 1),
    "max_positions": (0, -1, 2.5, "4", _NAN),
    "drop_outliers": (-0.1, 1, _NAN, "0.1", None, [0.1]),
    "probe_every": (-1, 1.5, "100", None, _NAN),
    "trim": ("maybe",),
    "scope": ("world", "", None, 1),
    "chunk_rows": (0, -1, 1.5, "4", _NAN),
    "dtype": ("float", "bfloat16", 5, float, torch.int64),
    "exit_head": ("head", 5, nn.Linear(3, 3)),
    "exit_optimizer": ("adam", 5),
    "ledger": ("ledger.jsonl", 5),
    "no_such": (1,),
}


def _arguments() -> Iterator[Case]:
    for name, values in _ARGUMENTS.items():
        for value in values:
            for mode in ("fixed", "auto") if name in ("keep", "depth", "score", "probe_every") else (None,):
                given = {name: value} if mode in (None, "fixed") else {name: value, "mode": mode}
                if name == "exit_optimizer":
                    given["exit_head"] = exits.ExitHead(16)
                shown = ", ".join(f"{key}={held!r}" for key, held in given.items() if key != "exit_head" or name == key)
                yield _case(LIBRARY, f"Sifter(model, {shown})", partial(_sift, **given), name.replace("_", " "), name)
    for model in (None, "bert", 5, [], {}, nn.Linear, object()):
        yield _case(LIBRARY, f"Sifter({model!r})".split(" at 0x")[0], partial(_new_sifter, model), "model")
    controls: tuple[dict[str, Any], ...] = (
        {"depths": ()},
        {"depths": (0,)},
        {"depths": (99,)},
        {"depths": (1.5,)},
        {"depths": "1"},
        {"keeps": (1.5,)},
        {"keeps": (_NAN,)},
        {"keeps": 0.5},
        {"rules": ("best",)},
        {"rules": "greedy"},
        {"total_steps": 0},
        {"total_steps": -5},
        {"total_steps": 1.5},
        {"end_share": 0},
        {"end_share": _NAN},
        {"probe_share": 0},
        {"probe_share": _NAN},
        {"reference_costs": {}},
        {"reference_costs": {"train": 1.0}},
        {"reference_costs": {"train": 0.0, "probe": 1.0, "score_1": 1.0}},
        {"reference_costs": {"train": -1.0, "probe": 1.0, "score_1": 1.0}},
        {"reference_costs": {"train": _NAN, "probe": 1.0, "score_1": 1.0}},
        {"reference_costs": {"train": "x", "probe": 1.0, "score_1": 1.0}},
        {"reference_costs": [1.0]},
    )
    for given in controls:
        (name,) = given
        refused = given != {"depths": (99,)}  # choices that a model does not have are left out
        shown = f"Control({name}={given[name]!r})"
        yield _case(LIBRARY, shown, partial(_configured, Control, given), name, refused=refused)


# Pools


def _changed(change: Callable[[dict[str, Any]], Any], task: str = "masked_lm") -> Any:
    return change(_pool(task))


def _with(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda pool: {**pool, **values}


_POOLS: tuple[tuple[str, Callable[[dict[str, Any]], Any], tuple[str, ...]], ...] = (
    ("None", lambda pool: None, ("tensors",)),
    ("five", lambda pool: 5, ("tensors",)),
    ("text", lambda pool: "pool", ("tensors",)),
    ("an empty dict", lambda pool: {}, ("tensors",)),
    ("an empty list", lambda pool: [], ("tensors",)),
    ("lists of numbers", lambda pool: {name: rows.tolist() for name, rows in pool.items()}, ("tensors",)),
    ("arrays of NumPy", lambda pool: {name: rows.numpy() for name, rows in pool.items()}, ("tensors",)),
    ("no candidate", lambda pool: {name: rows[:0] for name, rows in pool.items()}, ("candidates", "empty")),
    ("one candidate", lambda pool: {name: rows[:1] for name, rows in pool.items()}, ()),
    ("no labels", lambda pool: {"input_ids": pool["input_ids"]}, ("labels",)),
    ("labels are None", _with(labels=None), ("labels",)),
    ("labels are a list", lambda pool: {**pool, "labels": pool["labels"].tolist()}, ("labels",)),
    ("labels are text", _with(labels="x"), ("labels",)),
    ("fewer labels", lambda pool: {**pool, "labels": pool["labels"][:5]}, ("first dimension",)),
    ("fewer masks", lambda pool: {**pool, "attention_mask": pool["attention_mask"][:3]}, ("first dimension",)),
    ("shorter labels", lambda pool: {**pool, "labels": pool["labels"][:, :3]}, ("labels",)),
    ("longer labels", lambda pool: {**pool, "labels": torch.cat([pool["labels"]] * 2, dim=1)}, ("labels",)),
    ("labels of one dimension", lambda pool: {**pool, "labels": pool["labels"][:, 0]}, ("labels",)),
    ("labels of three dimensions", lambda pool: {**pool, "labels": pool["labels"][..., None]}, ("labels",)),
    ("labels of no dimension", _with(labels=torch.tensor(1)), ("labels",)),
    ("labels beyond the vocabulary", lambda pool: {**pool, "labels": pool["labels"] + _VOCABULARY}, ("labels",)),
    ("negative labels", lambda pool: {**pool, "labels": -pool["labels"]}, ("labels",)),
    ("labels of -1", lambda pool: {**pool, "labels": torch.full_like(pool["labels"], -1)}, ("labels",)),
    ("all labels ignored", lambda pool: {**pool, "labels": torch.full_like(pool["labels"], -100)}, ("label",)),
    *(
        (f"labels of {dtype}", lambda pool, dtype=dtype: {**pool, "labels": pool["labels"].to(dtype)}, ("labels",))
        for dtype in (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.bool, torch.complex64)
    ),
    ("labels of nan", lambda pool: {**pool, "labels": torch.full(pool["labels"].shape, _NAN)}, ("labels",)),
    (
        "inputs beyond the vocabulary",
        lambda pool: {**pool, "input_ids": pool["input_ids"] + _VOCABULARY},
        ("input_ids", "inputs"),
    ),
    ("inputs of float", lambda pool: {**pool, "input_ids": pool["input_ids"].float()}, ("input_ids", "inputs")),
    (
        "inputs too long",
        lambda pool: {"input_ids": torch.ones(8, 40).long(), "labels": torch.ones(8, 40).long()},
        ("input_ids", "inputs", "positions"),
    ),
    ("inputs of one dimension", lambda pool: {**pool, "input_ids": pool["input_ids"][:, 0]}, ("input_ids", "inputs")),
    (
        "inputs of no position",
        lambda pool: {name: rows[:, :0] for name, rows in pool.items()},
        ("input_ids", "inputs", "label"),
    ),
    ("no inputs", lambda pool: {"labels": pool["labels"]}, ("input_ids", "inputs", "model")),
    ("an unknown input", _with(unknown=torch.ones(8)), ("unknown",)),
    ("a mask of three dimensions", lambda pool: {**pool, "attention_mask": torch.ones(8, 2, 3)}, ("attention_mask",)),
    (
        "a packed row",
        lambda pool: {name: rows[:1] for name, rows in pool.items()} | {"cu_seqlens": torch.tensor([0])},
        ("packed",),
    ),
    ("a triple", lambda pool: (pool["input_ids"], pool["labels"], pool["labels"]), ("labels", "pair")),
    ("a set", lambda pool: {1, 2}, ("tensors",)),
    ("a generator", lambda pool: (row for row in pool), ("tensors",)),
    ("int32 labels", lambda pool: {**pool, "labels": pool["labels"].int()}, ("labels",)),
    ("a note beside it", lambda pool: {**pool, "note": ["x"] * 7}, ()),
)
_MAY_DO = (  # what a model may well take, or what is no error
    *("int32 labels", "labels of torch.uint8", "all labels ignored", "one candidate", "an unknown input"),
    *("a note beside it", "inputs too long", "a mask of three dimensions"),
)


def _pools() -> Iterator[Case]:
    for made, change, words in _POOLS:
        refused = made not in _MAY_DO
        for task, name in (("masked_lm", "BertForMaskedLM"), ("causal_lm", "LlamaForCausalLM")):
            yield _case(LIBRARY, f"{task}, pool: {made}", partial(_pooled, name, task, change), *words, refused=refused)
    for made, change, words in _POOLS:
        if "labels" in made:
            refused = made not in (*_MAY_DO, "labels of one dimension")
            if made in ("shorter labels", "longer labels", "labels of one dimension"):
                continue
            act = partial(_pooled, "BertForSequenceClassification", "classes", change)
            yield _case(LIBRARY, f"classes, pool: {made}", act, *words, refused=refused)
    for made, change, words in _POOLS:
        if "labels" in made and made not in ("no labels", "shorter labels", "longer labels", "labels of one dimension"):
            act = partial(_pooled, "", "plain", change)
            yield _case(LIBRARY, f"plain model, pool: {made}", act, *words, refused=made not in _MAY_DO)


def _pooled(model: str, task: str, change: Callable[[dict[str, Any]], Any]) -> None:
    pool = _changed(change, task)
    if model:
        _sift(_small(model), pool)
    else:
        if isinstance(pool, dict) and set(pool) == {"x", "labels"}:
            pool = (pool["x"], pool["labels"])
        _sift(_plain(), pool, family=_PLAIN)


# Models


class _Odd(nn.Module):
    """A model whose forward does what it is told."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], blocks: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) if blocks is None else blocks
        self.head = nn.Linear(4, _CLASSES)
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _through(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = block(x)
    return x


_MODELS: tuple[tuple[str, Callable[[], nn.Module], bool], ...] = (
    ("returns None", lambda: _Odd(lambda self, x: None), True),
    ("returns text", lambda: _Odd(lambda self, x: "logits"), True),
    ("returns a number", lambda: _Odd(lambda self, x: 5.0), True),
    ("returns nothing of it", lambda: _Odd(lambda self, x: torch.zeros(len(x), _CLASSES)), False),
    ("returns a dict", lambda: _Odd(lambda self, x: {"scores": self.head(_through(self, x))}), True),
    ("returns other rows", lambda: _Odd(lambda self, x: self.head(_through(self, x))[:3]), True),
    ("returns four dimensions", lambda: _Odd(lambda self, x: self.head(_through(self, x))[:, None, None]), True),
    ("raises", lambda: _Odd(lambda self, x: 1 / 0), True),
    ("skips its layers", lambda: _Odd(lambda self, x: self.head(x)), True),
    ("runs its layers twice", lambda: _Odd(lambda self, x: self.head(_through(self, _through(self, x)))), True),
    ("runs its layers backwards", lambda: _Odd(lambda self, x: self.head(self.blocks[0](self.blocks[1](x)))), True),
    ("has no layer", lambda: _Odd(lambda self, x: self.head(x), nn.ModuleList()), True),
    (
        "has one layer",
        lambda: _Odd(lambda self, x: self.head(_through(self, x)), nn.ModuleList([nn.Linear(4, 4)])),
        True,
    ),
    ("has layers in a dict", lambda: _Odd(lambda self, x: self.head(x), nn.ModuleDict()), True),
    ("has layers in a module", lambda: _Odd(lambda self, x: self.head(self.blocks(x)), nn.Linear(4, 4)), True),
    ("indexes its layers", lambda: _Odd(lambda self, x: self.head(self.blocks[1](self.blocks[0](x)))), True),
    ("has no parameter", lambda: nn.Identity(), True),
    ("is in evaluation mode", lambda: _plain().eval(), True),
    ("gives nan", lambda: _Odd(lambda self, x: self.head(_through(self, x)) * _NAN), True),
    ("gives infinite numbers", lambda: _Odd(lambda self, x: self.head(_through(self, x)) / 0.0), True),
    ("is a DataParallel", lambda: nn.DataParallel(_plain()), True),
    ("is half", lambda: _plain().half(), False),
    ("is an averaged model", lambda: torch.optim.swa_utils.AveragedModel(_plain()), False),
    ("is frozen", lambda: _plain().requires_grad_(False), False),
)


def _models() -> Iterator[Case]:
    for made, build, refused in _MODELS:
        for score in ("loss", "exact", "entropy"):
            yield _case(
                LIBRARY,
                f"a model that {made}, score={score!r}",
                partial(_modelled, build, score),
                refused=refused and not (score == "exact" and "layer" in made),
            )
    for name in (
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "ViTForImageClassification",
        "MambaForCausalLM",
    ):
        yield _case(LIBRARY, f"a {name} without a family row", partial(_of_transformers, name), refused=False)


def _modelled(build: Callable[[], nn.Module], score: str) -> None:
    model = build()
    core: Any = model.module if isinstance(model, nn.DataParallel | torch.optim.swa_utils.AveragedModel) else model
    family = Family("blocks", (("head",),), "sequence_classification") if isinstance(core, _Odd) else _PLAIN
    x, labels = _pool("plain").values()
    if next(model.parameters(), x).dtype == torch.float16:
        x = x.half()
    sifter = Sifter(model, score=score, family=family)
    for _ in range(2):
        sifter.sift((x, labels))


def _of_transformers(name: str) -> None:
    sizes = {
        "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
        "BartForConditionalGeneration": {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    }
    model = _small(name, **sizes.get(name, {}))
    _sift(model, _pool())


# Scorers, selectors, schedules of a user's own


def _indices(*values: Any, weights: Any = None, dtype: torch.dtype = torch.int64) -> Any:
    return Selection(torch.tensor(values, dtype=dtype), torch.ones(len(values)) if weights is None else weights)


def _functions() -> Iterator[Case]:
    scored: dict[str, Callable[[nn.Module, Any], Any]] = {
        "None": lambda model, pool: None,
        "five": lambda model, pool: 5,
        "text": lambda model, pool: "scores",
        "a list": lambda model, pool: [1.0] * _ROWS,
        "an array of NumPy": lambda model, pool: torch.ones(_ROWS).numpy(),
        "a scalar": lambda model, pool: torch.tensor(1.0),
        "too few": lambda model, pool: torch.ones(_ROWS - 1),
        "too many": lambda model, pool: torch.ones(_ROWS + 1),
        "two dimensions": lambda model, pool: torch.ones(_ROWS, 1),
        "all nan": lambda model, pool: torch.full((_ROWS,), _NAN),
        "all infinite": lambda model, pool: torch.full((_ROWS,), math.inf),
        "booleans": lambda model, pool: torch.ones(_ROWS, dtype=torch.bool),
        "a tuple": lambda model, pool: (torch.ones(_ROWS), None),
    }
    for made, score in scored.items():
        yield _case(
            LIBRARY, f"a scorer that returns {made}", partial(_sift, score=score), "score", refused=made != "booleans"
        )
    whole = partial(_sift, score=lambda model, pool: torch.arange(_ROWS))
    yield _case(LIBRARY, "a scorer that returns whole numbers", whole, refused=False)
    selected: dict[str, Callable[..., Any]] = {
        "None": lambda *_: None,
        "five": lambda *_: 5,
        "text": lambda *_: "rows",
        "indices alone": lambda *_: torch.arange(4),
        "a list": lambda *_: [0, 1, 2, 3],
        "a pair of lists": lambda *_: _selection([0, 1, 2, 3], [1.0] * 4),
        "a pair": lambda *_: (torch.arange(4), torch.ones(4)),
        "too few": lambda *_: _indices(0, 1),
        "too many": lambda *_: _indices(*range(8)),
        "nothing": lambda *_: _indices(),
        "rows twice": lambda *_: _indices(0, 0, 1, 2),
        "rows that are not there": lambda *_: _indices(0, 1, 2, 99),
        "negative rows": lambda *_: _indices(0, 1, 2, -1),
        "rows as real numbers": lambda *_: _indices(0, 1, 2, 3, dtype=torch.float32),
        "a mask": lambda *_: _indices(1, 1, 0, 1, dtype=torch.bool),
        "two dimensions": lambda *_: _selection(torch.arange(4)[:, None], torch.ones(4)),
        "too few weights": lambda *_: _indices(0, 1, 2, 3, weights=torch.ones(3)),
        "weights of nan": lambda *_: _indices(0, 1, 2, 3, weights=torch.full((4,), _NAN)),
        "negative weights": lambda *_: _indices(0, 1, 2, 3, weights=-torch.ones(4)),
        "no weights": lambda *_: _selection(torch.arange(4), None),
    }
    for made, select in selected.items():
        act = partial(_sift, select=select)
        yield _case(
            LIBRARY,
            f"a selector that returns {made}",
            act,
            "select",
            refused=made not in ("a pair", "rows twice", "negative weights"),
        )
    for made, value in (("nan", _NAN), ("text", "x"), ("None", None)):
        yield _case(
            LIBRARY,
            f"a schedule that returns {made}",
            partial(_sift, schedule=lambda step, value=value: value),
            "schedule",
        )


# Family rows


def _families() -> Iterator[Case]:
    bert = "bert.encoder.layer"
    rows: tuple[tuple[str, Callable[[], Family]], ...] = (
        ("layers that are not there", lambda: _family("nothing.here")),
        ("layers of no name", lambda: _family("")),
        ("layers that are no list", lambda: _family("bert.encoder")),
        ("layers that are None", lambda: _family(None)),
        ("layers that are five", lambda: _family(5)),
        ("layers that are a parameter", lambda: _family("bert.embeddings.word_embeddings.weight")),
        ("a head that is not there", lambda: _family(bert, (("nothing",),), "masked_lm")),
        ("a head that is a name", lambda: _family(bert, "cls", "masked_lm")),
        ("a head of names", lambda: _family(bert, ("cls",), "masked_lm")),
        ("a head that is five", lambda: _family(bert, 5, "masked_lm")),
        ("a head that is a layer", lambda: _family(bert, (("bert.encoder.layer.1",),), "masked_lm")),
        ("a head that is the embedding", lambda: _family(bert, (("bert.embeddings",),), "masked_lm")),
        ("an unknown task", lambda: _family(bert, (("cls",),), "poetry")),
        ("the wrong task", lambda: _family(bert, (("cls",),), "causal_lm")),
        ("a task for classes", lambda: _family(bert, (("cls",),), "sequence_classification")),
        ("positionwise modules that are not there", lambda: _family(bert, (("cls",),), "masked_lm", (("nothing",),))),
        ("positionwise modules that are a name", lambda: _family(bert, (("cls",),), "masked_lm", "output")),
        ("positionwise modules that mix positions", lambda: _family(bert, (("cls",),), "masked_lm", (("attention",),))),
    )
    harmless = ("positionwise modules that are not there",)
    for made, row in rows:
        act = partial(_rowed, row)
        yield _case(
            LIBRARY, f"a family row with {made}", act, refused=made not in harmless and made != "the wrong task"
        )


def _rowed(row: Callable[[], Family]) -> None:
    _sift(family=row())


# Other parts of the library


def _parts() -> Iterator[Case]:
    pool, states, labels = _pool(), torch.randn(8, 6, 4), torch.zeros(8, 6).long()
    scores, generator = torch.rand(8), torch.Generator()
    tries: tuple[tuple[str, Callable[[], Any], tuple[str, ...]], ...] = (
        ("greedy keeps none", lambda: selectors.greedy(scores, 0), ("kept",)),
        ("greedy keeps too many", lambda: selectors.greedy(scores, 99), ("kept",)),
        ("greedy of two dimensions", lambda: selectors.greedy(scores[None], 1), ("scores",)),
        ("greedy of nothing", lambda: selectors.greedy(scores[:0], 1), ("scores", "kept")),
        ("proportional of negative scores", lambda: selectors.proportional(-scores, 2, generator), ("scores",)),
        (
            "proportional with a share of nan",
            lambda: selectors.proportional(scores, 2, generator, uniform_share=_NAN),
            ("uniform_share",),
        ),
        ("warmup of nan steps", lambda: _schedules.warmup(_NAN), ("steps",)),
        ("anneal backwards", lambda: _schedules.anneal(5, 5), ("start", "end")),
        ("anneal of nan", lambda: _schedules.anneal(0, _NAN), ("start", "end")),
        ("a constant of nan", lambda: _schedules.constant(_NAN), ("value", "schedule")),
        (
            "token losses of labels beyond",
            lambda: losses.token_scores(LOSS, states, labels + 99, nn.Linear(4, 5)),
            ("labels",),
        ),
        (
            "token losses of float labels",
            lambda: losses.token_scores(LOSS, states, labels.float(), nn.Linear(4, 5)),
            ("labels",),
        ),
        (
            "token losses of other rows",
            lambda: losses.token_scores(LOSS, states, labels[:3], nn.Linear(4, 5)),
            ("labels",),
        ),
        (
            "class losses of labels beyond",
            lambda: _losses.class_scores(LOSS, states[:, 0], labels[:, 0] + 99),
            ("labels",),
        ),
        ("class losses of other rows", lambda: _losses.class_scores(LOSS, states[:, 0], labels[:3, 0]), ("labels",)),
        (
            "class losses of an unknown problem",
            lambda: _losses.class_scores(LOSS, states[:, 0], labels[:, 0], problem="x"),
            ("problem",),
        ),
        (
            "exit loss of labels beyond",
            lambda: _sifter().exit_loss({**pool, "labels": pool["labels"] + 99}),
            ("labels",),
        ),
        ("exit loss without labels", lambda: _sifter().exit_loss({"input_ids": pool["input_ids"]}), ("labels",)),
        (
            "training loss without labels",
            lambda: scorers.training_loss(_small("BertForMaskedLM"), {"input_ids": pool["input_ids"]}),
            ("labels",),
        ),
        (
            "training loss at depth 9",
            lambda: scorers.training_loss(_small("BertForMaskedLM"), pool, depth=9),
            ("depth",),
        ),
        ("a score at depth 9", lambda: scorers.early_exit_loss(_small("BertForMaskedLM"), pool, depth=9), ("depth",)),
        (
            "a score of 0 chunk rows",
            lambda: scorers.early_exit_loss(_small("BertForMaskedLM"), pool, chunk_rows=0),
            ("chunk_rows",),
        ),
        ("weights before any pool", lambda: _sifter().weights, ("weights",)),
        ("wanted before any pool", lambda: _sifter().wanted, ("kept",)),
        ("a probe of a pool without labels", lambda: _sifter().probe({"input_ids": pool["input_ids"]}), ("labels",)),
        (
            "a truncated model of depth 0",
            lambda: earlysift.truncated(_small("BertForMaskedLM"), 0).__enter__(),
            ("depth",),
        ),
        ("an exit head of width nan", lambda: _exits.ExitHead(_NAN), ("width",)),
        ("an exit head with -1 hidden", lambda: _exits.ExitHead(4, hidden=-1), ("hidden",)),
        (
            "an exit head of another width",
            lambda: _sift(exit_head=_exits.ExitHead(3)),
            ("width", "exit head", "exit_head", "ExitHead"),
        ),
    )
    for made, act, words in tries:
        yield _case(LIBRARY, made, act, *words)


# Saved states

_STATE_VALUES: tuple[Any, ...] = ("x", -1, 1.5, None, [], {}, _NAN, True)
_REFUSED_STATES: dict[str, tuple[Any, ...]] = {  # by part: values that it can have
    "kept": (None,),
    "steering": (None,),
    "fidelity": ({},),
}


def _states() -> Iterator[Case]:
    """States with a part that is missing, of another type, or of another sifter."""
    for mode in ("fixed", "auto"):
        parts = (
            *("version", "config", "step", "micro_step", "pools_per_step", "kept", "largest", "counts", "fidelity"),
            *("steering", "weights_read"),
        )
        for part in parts:
            yield _case(
                STATE, f"{mode} sifter, no {part}", partial(_loaded, mode, partial(_without, part)), part, "state"
            )
            for value in _STATE_VALUES:
                if (
                    part == "weights_read"
                    or value in _REFUSED_STATES.get(part, ())
                    or (part == "step" and value is True)
                ):
                    continue
                if mode == "fixed" and part == "steering" and not value:
                    continue
                change = partial(_put, (part,), value)
                yield _case(STATE, f"{mode} sifter, {part} is {value!r}", partial(_loaded, mode, change), part, "state")
        for name in ("candidates", "scored", "trained", "unlabelled", "non_finite"):
            for value in ("x", -1, None, 1.5):
                change = partial(_put, ("counts", name), value)
                yield _case(
                    STATE,
                    f"{mode} sifter, counts of {name} are {value!r}",
                    partial(_loaded, mode, change),
                    "counts",
                    name,
                )
            yield _case(
                STATE,
                f"{mode} sifter, no counts of {name}",
                partial(_loaded, mode, partial(_without, name, "counts")),
                "counts",
                name,
            )
        change = partial(_put, ("counts", "unknown"), 1)
        yield _case(
            STATE, f"{mode} sifter, counts of something unknown", partial(_loaded, mode, change), "counts", "unknown"
        )
        for name, value in (("keep", 0.25), ("depth", 9), ("seed", 1), ("mode", "x"), ("schedule", None)):
            yield _case(
                STATE,
                f"{mode} sifter, configured with {name} {value!r}",
                partial(_loaded, mode, partial(_put, ("config", name), value)),
                name,
            )
    for name in ("choice", "records", "next_probe", "before"):
        yield _case(
            STATE,
            f"auto sifter, no {name}",
            partial(_loaded, "auto", partial(_without, name, "steering")),
            "steering",
            name,
        )
        for value in ("x", -1, 1.5, {}, [1]):
            change = partial(_put, ("steering", name), value)
            yield _case(STATE, f"auto sifter, {name} is {value!r}", partial(_loaded, "auto", change), "steering", name)
    for value in (["best", 1, 0.5], ["greedy", 9, 0.5], ["greedy", 1, 7.0], ["greedy", 1], ["greedy", "x", 0.5]):
        yield _case(
            STATE,
            f"auto sifter, choice is {value!r}",
            partial(_loaded, "auto", partial(_put, ("steering", "choice"), value)),
            "steering",
            "choice",
        )
    wrong: tuple[Any, ...] = ([{}], [None], [{"loss": "x"}], ["x"])
    for records in wrong:
        yield _case(
            STATE,
            f"auto sifter, records are {records!r}",
            partial(_loaded, "auto", partial(_put, ("steering", "records"), records)),
            "steering",
            "records",
        )
    others: tuple[Any, ...] = (None, 5, [], "x", {})
    for state in others:
        yield _case(STATE, f"a state that is {state!r}", partial(_loaded, "fixed", partial(_instead, state)), "state")
    yield _case(STATE, "a state of auto for a fixed sifter", partial(_crossed, "auto", "fixed"), "mode")
    yield _case(STATE, "a state of a fixed sifter for auto", partial(_crossed, "fixed", "auto"), "mode")
    for made, change in (
        ("no exit head", partial(_without, "exit_head")),
        ("an empty exit head", partial(_put, ("exit_head",), {})),
        ("an exit head of another width", partial(_put, ("exit_head",), exits.ExitHead(4).state_dict())),
        ("an exit head that is text", partial(_put, ("exit_head",), "x")),
        ("no exit optimizer", partial(_without, "exit_optimizer")),
        ("an empty exit optimizer", partial(_put, ("exit_optimizer",), {})),
        ("an exit optimizer that is text", partial(_put, ("exit_optimizer",), "x")),
    ):
        yield _case(
            STATE,
            f"a state with {made}",
            partial(_loaded, "head", change),
            "exit_head",
            "exit_optimizer",
            "exit head",
            "exit optimizer",
        )


def _instead(other: Any, _: Any) -> Any:
    return other


def _without(name: str, *where: Any) -> Any:
    *path, state = where
    inner = state
    for step in path:
        inner = inner[step]
    del inner[name]
    return state


def _put(path: tuple[str, ...], value: Any, state: Any) -> Any:
    inner = state
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return state


_COSTS = {"train": 100.0, "probe": 10.0, "score_1": 10.0}


def _used(mode: str, pools: int = 3) -> Sifter:
    """A sifter that has sifted."""
    options: dict[str, Any] = {"kept": 4}
    if mode == "auto":
        options |= {"mode": "auto", "control": Control(probe_share=0.5, reference_costs=_COSTS)}
    if mode == "head":
        head = exits.ExitHead(16)
        options |= {"exit_head": head, "exit_optimizer": torch.optim.Adam(head.parameters())}
    torch.manual_seed(0)
    sifter = _sifter(**options)
    for _ in range(pools):
        sifter.sift(_pool())
    return sifter


def _loaded(mode: str, change: Callable[[Any], Any]) -> None:
    """Load a changed state; whatever is refused must leave the sifter as it was, and what is taken must work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load(_used(mode), change(copy.deepcopy(_used(mode, pools=5).state_dict())))


def _crossed(saved: str, loaded: str) -> None:
    _load(_used(loaded), _used(saved, pools=5).state_dict())


def _load(sifter: Sifter, state: Any) -> None:
    before = _shown(sifter)
    try:
        sifter.load_state_dict(state)
    except Exception:
        if _shown(sifter) != before:
            raise Lost("the sifter's state after one that was refused") from None
        raise
    sifter.sift(_pool())
    sifter.state_dict()


# The file of a Trainer's checkpoint


_OF_TRAINER = ("batch_size", "sifter", "candidates_seen", "samples_trained")
_OF_NO_TYPE: tuple[Any, ...] = ("x", None, [], -1)


def _edited(change: Callable[[Any], Any], text: str) -> bytes:
    return json.dumps(change(json.loads(text))).encode()


def _checkpoints() -> Iterator[Case]:
    contents: dict[str, Callable[[str], bytes]] = {
        "empty": lambda text: b"",
        "cut": lambda text: text.encode()[: len(text) // 2],
        "binary": lambda text: bytes(range(256)),
        "five": lambda text: b"5",
        "a list": lambda text: b"[]",
        "an object": lambda text: b"{}",
        "NaN": lambda text: b"NaN",
        "deep": lambda text: b"[" * 10**5,
        "UTF-16": lambda text: text.encode("utf-16"),
        **{f"no {name}": partial(_edited, partial(_without, name)) for name in _OF_TRAINER},
        **{
            f"{name} is {value!r}": partial(_edited, partial(_put, (name,), value))
            for name in _OF_TRAINER
            for value in _OF_NO_TYPE
        },
        "step is text": lambda text: text.replace('"step": ', '"step": "x", "no": ').encode(),
    }
    for made, change in contents.items():
        yield _case(STATE, f"a Trainer's sifter_0.json: {made}", partial(_resumed, change), "sifter_0.json")
    yield _case(STATE, "a Trainer's sifter_0.json is gone", partial(_resumed, None), refused=False)


def _resumed(change: Callable[[str], bytes] | None) -> None:
    """Train two steps, change the file, and go on."""
    _trainer(max_steps=2).train()
    path = Path("trainer/checkpoint-2/sifter_0.json")
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_text()))
    _trainer(max_steps=3).train(resume_from_checkpoint="trainer/checkpoint-2")


def _trainer(max_steps: int) -> SiftTrainer:
    rows = [{name: held[i] for name, held in _pool(rows=32).items()} for i in range(32)]
    args = transformers.TrainingArguments(
        "trainer",
        per_device_train_batch_size=4,
        max_steps=max_steps,
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        report_to="none",
    )
    return SiftTrainer(model=_small("BertForMaskedLM"), args=args, train_dataset=rows, sift=SiftConfig())
