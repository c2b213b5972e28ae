"""Workloads: what is trained on which data, ready to run. One call gives samples, models and the baseline to beat."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from earlysift.losses import IGNORED_LABEL
from earlysift.pretrain import models
from earlysift.pretrain.corpus import Corpus, LabelledCorpus, optional_package, read_corpus, read_labelled
from earlysift.pretrain.masking import begins_word, mask_tokens
from earlysift.pretrain.stream import Rows, Samples
from earlysift.pretrain.streaming import FIRST_CHARACTERS, first_part
from earlysift.pretrain.tokens import Blocks, load_blocks
from earlysift.seeds import seeded

_REPEATED_SAMPLES = 64  # what boilerplate is drawn from
_DIGITS_VALIDATION = 360  # of 1,797
_DIGITS_PATCH = 2  # pixels: 8 x 8 pixels give 16 patches


@dataclass(frozen=True)
class Workload:
    """Samples, the model to train on them, and what is known about both.

    Attributes:
        name: What reports call it.
        task: One of `TASKS`.
        samples: Training and validation samples.
        make_model: From a seed to a model in training mode.
        baseline: ``accuracy`` and ``loss`` (nats) on the validation part of a model that ignores its input and
            predicts how often every token or class occurs in the training part.
        facts: Sizes and settings of the data, for the results file.
        tokenizer_json: The tokenizer, for `save_encoder`; empty for images.
    """

    name: str
    task: str
    samples: Samples
    make_model: Callable[[int], nn.Module]
    baseline: dict[str, float]
    facts: dict[str, Any]
    tokenizer_json: str = ""


def load_workload(
    *,
    task: str,
    data: Path | tuple[Path, ...] | None = None,
    layers: int,
    width: int,
    length: int,
    vocab_size: int,
    validation_samples: int,
    train_samples: int | None = None,
    max_characters: int | None = None,
    flipped: float = 0.0,
    repeated: float = 0.0,
    checkpoint: Path | None = None,
    tokenizer_file: Path | None = None,
    whole_word: bool = False,
    stream: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
    seed_of_data: int = 0,
) -> Workload:
    """Read the data of a task and make it ready to train on.

    Args:
        task: ``masked_lm`` (BERT), ``causal_lm`` (Llama), ``classification`` (of texts, BERT) or ``image`` (ViT).
        data: Text, for classification a table with the columns ``label`` and ``text``; several paths are one corpus.
            None is the standard library's text for language modelling, and scikit-learn's handwritten digits, the only
            images there are.
        layers: Number of layers.
        width: Width of the model, a multiple of 32.
        length: Tokens per sample; for images not used.
        vocab_size: Size of the vocabulary trained on the training part; for images not used.
        validation_samples: Held-out samples to evaluate on, spread over the validation part; at most all.
        train_samples: Training samples to use, drawn at random; at most all. None uses all.
        max_characters: For language modelling, use only documents of about so many characters in each part, drawn at
            random (always the same ones), so that large corpora load in seconds. None uses all.
        flipped: Share of training labels that are replaced by another class. Validation keeps the true ones.
        repeated: Share of the samples, in both parts, that are copies of 64 training samples: boilerplate.
        checkpoint: Folder of `save_encoder` to fine-tune from, for classification; its tokenizer is used, too.
        tokenizer_file: BERT vocab.txt or tokenizer.json, in place of a trained tokenizer.
        whole_word: For masked language modelling, hide all tokens of a word together.
        stream: For language modelling, read only the first part of the data, see `streaming`.
        text_column: The column of tables that holds the text; None is ``text``, else the only one of strings.
        label_column: For classification, the column that holds the label; None is ``label``.
        seed_of_data: Seed of which samples are used, copied and flipped.

    Returns:
        The workload; the same arguments give the same one everywhere.

    Raises:
        ValueError: If settings do not fit the task, or the data cannot be used.
        FileNotFoundError: If a path leads nowhere.
        ImportError: If an optional package is missing.

    Example:
        >>> workload = load_workload(task="image", layers=2, width=32, length=0, vocab_size=0, validation_samples=99)
        >>> {name: tuple(rows.shape) for name, rows in workload.samples.validation.items()}
        {'pixel_values': (99, 1, 8, 8), 'labels': (99,)}
    """
    request = _Request(
        data,
        layers,
        width,
        length,
        vocab_size,
        max_characters,
        checkpoint,
        tokenizer_file,
        whole_word,
        stream,
        text_column,
        label_column,
    )
    problems = _problems(task, request, validation_samples, train_samples, flipped, repeated)
    if problems:
        raise ValueError(" ".join(problems))
    source = _SOURCES[task](request)
    train = _some(source.train, train_samples, seeded(seed_of_data, "train samples"))
    validation = _spread(source.validation, validation_samples)
    if repeated:
        train, validation = _repeat(train, validation, repeated, seed_of_data)
    if flipped:
        train = {**train, "labels": _flip(train["labels"], flipped, source.outputs, seed_of_data)}
    samples = Samples(train, source.prepare(validation, seeded("validation mask")), source.prepare)
    changes = [
        f", {share:.0%} {what}" for share, what in ((flipped, "of labels flipped"), (repeated, "repeated")) if share
    ]
    return Workload(
        name=f"{source.name}, {source.label}{''.join(changes)}",
        task=task,
        samples=samples,
        make_model=source.make_model,
        baseline=_baseline(source.targets(train), samples.validation["labels"], source.outputs),
        facts={
            "train_samples": len(samples),
            "validation_samples": len(samples.validation["labels"]),
            **source.facts,
            "flipped": flipped,
            "repeated": repeated,
        },
        tokenizer_json=source.tokenizer_json,
    )


@dataclass(frozen=True)
class _Request:
    """What `load_workload` is asked for, as far as it depends on the task what it means."""

    data: Path | tuple[Path, ...] | None
    layers: int
    width: int
    length: int
    vocab_size: int
    max_characters: int | None
    checkpoint: Path | None
    tokenizer_file: Path | None
    whole_word: bool
    stream: bool
    text_column: str | None
    label_column: str | None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.data,) if isinstance(self.data, Path) else self.data or ()


@dataclass(frozen=True)
class _Source:
    """All samples of a task, as they are stored, and what belongs to them."""

    name: str
    label: str
    train: Rows
    validation: Rows
    prepare: Callable[[Rows, Generator], Rows]
    targets: Callable[[Rows], Tensor]  # stored rows -> everything a model may be asked to predict there
    outputs: int  # number of tokens or classes to choose from
    make_model: Callable[[int], nn.Module]
    facts: dict[str, Any]
    tokenizer_json: str = ""


def _problems(
    task: str, request: _Request, validation_samples: int, train_samples: int | None, flipped: float, repeated: float
) -> list[str]:
    labelled = task in ("classification", "image")
    rules = [
        (task not in TASKS, f"Unknown task {task!r}; known are {', '.join(TASKS)}."),
        (
            task == "classification" and not request.paths,
            "The task classification needs data: a table with the columns 'label' and 'text'.",
        ),
        (
            task == "image" and bool(request.paths),
            "The task image has data of its own (scikit-learn's digits) and reads no other; leave data out.",
        ),
        (bool(flipped) and not labelled, f"Labels can be flipped in classification and image, not in {task}."),
        (
            request.max_characters is not None and labelled,
            f"max_characters cuts a text corpus; for {task} give train_samples.",
        ),
        (
            request.checkpoint is not None and task != "classification",
            f"A checkpoint can be fine-tuned on the task classification, not on {task}.",
        ),
        (
            request.checkpoint is not None and request.tokenizer_file is not None,
            "A checkpoint brings its tokenizer; leave tokenizer_file out.",
        ),
        (
            request.whole_word and task != "masked_lm",
            f"Whole words are hidden in masked language modelling, not in {task}; leave whole_word out.",
        ),
        (
            request.stream and (labelled or not request.paths),
            f"Text is read in passing from data that are given; for {task} without a path leave stream out.",
        ),
        (
            request.text_column is not None and not request.paths,
            f"text_column names a column of the data, and for {task} no data are given; leave text_column out.",
        ),
        (
            request.label_column is not None and task != "classification",
            f"Labels are read for the task classification, not for {task}; leave label_column out.",
        ),
        (validation_samples < 1, f"validation_samples must be at least 1, got {validation_samples}."),
        (train_samples is not None and train_samples < 1, f"train_samples must be at least 1, got {train_samples}."),
        (not 0 <= flipped < 1, f"flipped must be a share in [0, 1), got {flipped}."),
        (not 0 <= repeated <= 1, f"repeated must be a share in [0, 1], got {repeated}."),
    ]
    return [message for broken, message in rules if broken]


def _masked_lm(request: _Request) -> _Source:
    def prepare(rows: Rows, generator: Generator) -> Rows:
        return mask_tokens(
            rows["input_ids"],
            mask_id=blocks.special["[MASK]"],
            vocab_size=ordinary.stop,
            first_ordinary_id=ordinary.start,
            generator=generator,
            word_begins=word_begins,
        )

    def targets(rows: Rows) -> Tensor:
        ids = rows["input_ids"]
        return ids[(ids >= ordinary.start) & (ids < ordinary.stop)]

    corpus, blocks = _read_blocks(request)
    ordinary = _ordinary(blocks)
    word_begins = None
    if request.whole_word:
        tokenizer = optional_package("tokenizers", extra="hf").Tokenizer.from_str(blocks.tokenizer_json)
        word_begins = begins_word(tokenizer.get_vocab())
    return _language_source(corpus, blocks, request, "masked LM", prepare, targets, models.build_bert)


def _ordinary(blocks: Blocks) -> range:
    """The ids of ordinary tokens: those behind the special ones, or before them where a vocabulary ends with these."""
    special = blocks.special.values()
    return max(range(max(special) + 1, blocks.vocab_size), range(min(special)), key=len)


def _causal_lm(request: _Request) -> _Source:
    def prepare(rows: Rows, generator: Generator) -> Rows:
        ids = rows["input_ids"].long()
        labels = ids.clone()
        labels[:, [0, -1]] = IGNORED_LABEL  # the frame that every block has tells nothing about text
        return {"input_ids": ids, "labels": labels}

    def targets(rows: Rows) -> Tensor:
        return rows["input_ids"][:, 1:-1].flatten()

    corpus, blocks = _read_blocks(request)
    return _language_source(corpus, blocks, request, "causal LM", prepare, targets, models.build_llama)


def _language_source(
    corpus: Corpus,
    blocks: Blocks,
    request: _Request,
    label: str,
    prepare: Callable[[Rows, Generator], Rows],
    targets: Callable[[Rows], Tensor],
    build: Callable[..., nn.Module],
) -> _Source:
    return _Source(
        name=corpus.name,
        label=label,
        train={"input_ids": blocks.train},
        validation={"input_ids": blocks.validation},
        prepare=prepare,
        targets=targets,
        outputs=blocks.vocab_size,
        make_model=lambda seed: build(
            vocab_size=blocks.vocab_size, length=request.length, layers=request.layers, width=request.width, seed=seed
        ),
        facts={"length": request.length, "vocab_size": blocks.vocab_size},
        tokenizer_json=blocks.tokenizer_json,
    )


def _read_blocks(request: _Request) -> tuple[Corpus, Blocks]:
    if request.stream:
        characters = FIRST_CHARACTERS // len(request.paths)
        corpora = [first_part(path, characters, request.text_column) for path in request.paths]
    else:
        corpora = [read_corpus(path, text_column=request.text_column) for path in request.paths or (None,)]
    corpus = _joined(corpora)
    if request.max_characters is not None:
        train, validation = (_shortened(part, request.max_characters) for part in (corpus.train, corpus.validation))
        corpus = Corpus(corpus.name, train, validation)
    blocks = load_blocks(
        corpus, vocab_size=request.vocab_size, length=request.length, tokenizer_file=request.tokenizer_file
    )
    return corpus, blocks


def _joined(corpora: list[Corpus]) -> Corpus:
    return Corpus(
        " + ".join(corpus.name for corpus in corpora),
        [document for corpus in corpora for document in corpus.train],
        [document for corpus in corpora for document in corpus.validation],
    )


def _shortened(documents: list[str], characters: int) -> list[str]:
    """Documents drawn at random until they have that many characters, in their old order."""
    chosen = []
    for number in torch.randperm(len(documents), generator=seeded("documents")).tolist():
        if characters <= 0:
            break
        chosen.append(number)
        characters -= len(documents[number])
    return [documents[number] for number in sorted(chosen)]


def _classification(request: _Request) -> _Source:
    tokenizer_file = request.tokenizer_file
    if request.checkpoint is not None:
        models.require_checkpoint(request.checkpoint)
        tokenizer_file = request.checkpoint / models.TOKENIZER
    columns = {"text_column": request.text_column, "label_column": request.label_column}
    tables = [read_labelled(path, **columns) for path in request.paths]
    texts = _joined([table.texts for table in tables])
    blocks = load_blocks(
        texts, vocab_size=request.vocab_size, length=request.length, packed=False, tokenizer_file=tokenizer_file
    )
    classes, train_labels, validation_labels = _class_ids(texts.name, tables)

    def rows(ids: Tensor, labels: Tensor) -> Rows:
        ids = ids.long()
        return {"input_ids": ids, "attention_mask": (ids != blocks.special["[PAD]"]).long(), "labels": labels}

    return _Source(
        name=texts.name,
        label="fine-tuning" if request.checkpoint else "classification",
        train=rows(blocks.train, train_labels),
        validation=rows(blocks.validation, validation_labels),
        prepare=_as_stored,
        targets=_labels,
        outputs=len(classes),
        make_model=lambda seed: models.build_bert_classifier(
            classes=len(classes),
            vocab_size=blocks.vocab_size,
            length=request.length,
            layers=request.layers,
            width=request.width,
            checkpoint=request.checkpoint,
            seed=seed,
        ),
        facts={
            "length": request.length,
            "vocab_size": blocks.vocab_size,
            "classes": len(classes),
            "checkpoint": request.checkpoint and str(request.checkpoint),
        },
        tokenizer_json=blocks.tokenizer_json,
    )


def _class_ids(name: str, tables: list[LabelledCorpus]) -> tuple[list[str], Tensor, Tensor]:
    """The names of the classes, in the order of their ids, and the ids of both parts."""
    train = [label for table in tables for label in table.train_labels]
    validation = [label for table in tables for label in table.validation_labels]
    classes = sorted(set(train), key=lambda label: (len(label), label))  # 2 before 10
    unknown = sorted(set(validation) - set(classes))
    if len(classes) < 2:
        raise ValueError(f"{name}: expected labels of two classes or more, found only {classes[0]!r} in training.")
    if unknown:
        raise ValueError(f"{name}: validation has labels that training does not have: {', '.join(unknown[:5])}.")
    number = {label: position for position, label in enumerate(classes)}
    train_ids, validation_ids = (torch.tensor([number[label] for label in part]) for part in (train, validation))
    return classes, train_ids, validation_ids


def _image(request: _Request) -> _Source:
    digits = optional_package("sklearn.datasets", extra="data").load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)  # 0 .. 16 becomes -1 .. 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=seeded("digits"))
    train, validation = order[_DIGITS_VALIDATION:], order[:_DIGITS_VALIDATION]
    size, classes = images.size(-1), [str(name) for name in digits.target_names]
    return _Source(
        name="handwritten digits",
        label="image classification",
        train={"pixel_values": images[train], "labels": labels[train]},
        validation={"pixel_values": images[validation], "labels": labels[validation]},
        prepare=_as_stored,
        targets=_labels,
        outputs=len(classes),
        make_model=lambda seed: models.build_vit(
            size=size,
            channels=1,
            patch=_DIGITS_PATCH,
            classes=len(classes),
            layers=request.layers,
            width=request.width,
            seed=seed,
        ),
        facts={"pixels": f"{size} x {size}", "patch": _DIGITS_PATCH, "classes": len(classes)},
    )


def _as_stored(rows: Rows, generator: Generator) -> Rows:
    return rows


def _labels(rows: Rows) -> Tensor:
    return rows["labels"]


_SOURCES: dict[str, Callable[[_Request], _Source]] = {
    "masked_lm": _masked_lm,
    "causal_lm": _causal_lm,
    "classification": _classification,
    "image": _image,
}
TASKS = tuple(_SOURCES)


def _some(rows: Rows, count: int | None, generator: Generator) -> Rows:
    """Random rows, at most all, in their old order."""
    if count is None:
        return rows
    size = len(next(iter(rows.values())))
    chosen = torch.randperm(size, generator=generator)[:count].sort().values
    return {name: values[chosen] for name, values in rows.items()}


def _spread(rows: Rows, count: int) -> Rows:
    """Rows spread evenly over a part, at most all."""
    size = len(next(iter(rows.values())))
    chosen = torch.linspace(0, size - 1, min(count, size)).long()
    return {name: values[chosen] for name, values in rows.items()}


def _repeat(train: Rows, validation: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Put copies of a few training samples in random places of both parts."""
    size = len(next(iter(train.values())))
    common = torch.randperm(size, generator=seeded(seed, "repeated samples"))[:_REPEATED_SAMPLES]

    def with_copies(rows: Rows, part: str) -> Rows:
        generator = seeded(seed, "repeated", part)
        size = len(next(iter(rows.values())))
        places = torch.randperm(size, generator=generator)[: round(share * size)]
        copies = common[torch.randint(len(common), places.shape, generator=generator)]
        return {name: values.index_copy(0, places, train[name][copies]) for name, values in rows.items()}

    return with_copies(train, "train"), with_copies(validation, "validation")


def _flip(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Replace a share of the labels by another class, every other one with the same odds."""
    generator = seeded(seed, "flipped")
    places = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    steps = torch.randint(1, classes, places.shape, generator=generator)
    return labels.index_copy(0, places, (labels[places] + steps) % classes)


def _baseline(targets: Tensor, labels: Tensor, outputs: int) -> dict[str, float]:
    """Accuracy and loss on labels of predicting how often everything occurs among the targets (one added to each)."""
    counts = torch.bincount(targets.long(), minlength=outputs).double() + 1
    probabilities = counts / counts.sum()
    labels = labels[labels != IGNORED_LABEL]
    return {
        "accuracy": (labels == probabilities.argmax()).double().mean().item(),
        "loss": -probabilities[labels].log().mean().item(),
    }
