"""A text with natural redundancy: ``python benchmarks/redundant_text.py --data ../shared/data --out FOLDER``.

Mixes encyclopaedia articles (Wikipedia, else WikiText-2, below --data) of which some come up to 20 times, the source of
the standard library, licences and licence headers as they are installed here, and logs. Without --data the library's
files are copied in place of articles. ``earlysift compare --task causal_lm --data FOLDER`` reads what it writes:
train.jsonl and validation.jsonl, a text and its source a line.

Validation is a clean sample of the same mix, a twentieth of training's size, with the same share of every source. It is
split off before anything is copied: a held-out article or file of the library, chosen by the hash of its text, is never
in training, and comes once. Licences are boilerplate in both parts, drawn from the same files: that a text is known is
their nature. Logs have the same templates and other lines. The same inputs, seed and Python give the same bytes.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial
from importlib import metadata
from itertools import repeat
from pathlib import Path

from earlysift.files import write_whole
from earlysift.pretrain import formats
from earlysift.pretrain.corpus import held_out, stdlib_corpus

Parts = dict[str, list[tuple[str, str]]]
"""For ``train`` and ``validation`` the source and the text of every document."""

SHARES = {"articles": 0.4, "library": 0.3, "licences": 0.1, "logs": 0.2}
"""Of the characters of a part."""
MOST_COPIES = 20
LARGEST_SHARE = 0.9  # of copies: beyond it nearly every document would come MOST_COPIES times
_VALIDATION = 1 / 20
_ARTICLES = {  # folder, and what stands between two articles
    "wikipedia-en": re.compile(r"\n\s*\n"),
    "wikitext-2": re.compile(r"^(?= = [^=\n]+ = $)", re.MULTILINE),
}
_LICENCE = re.compile(r"licen[cs]e|copying|notice", re.IGNORECASE)
_ABOUT_RIGHTS = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
_HEADER = re.compile(r"(#.*\n)+")
_LARGEST_FILE = 100_000  # a few larger ones, tables mostly, would be most of a small mix
_LOG_LINES = range(20, 61)
# Of nginx, sshd, cron, Python's logging, Kubernetes, and PostgreSQL.
_LOGS = (
    '{ip} - - [{time:%d/%b/%Y:%H:%M:%S} +0000] "GET /{word}/{number} HTTP/1.1" {status} {size} "-" "curl/8.5.0"',
    "{time:%b %d %H:%M:%S} host{small} sshd[{number}]: Failed password for {word} from {ip} port {port} ssh2",
    "{time:%b %d %H:%M:%S} host{small} CRON[{number}]: (root) CMD (test -x /usr/sbin/{word} && /usr/sbin/{word} -q)",
    "{time:%Y-%m-%d %H:%M:%S},{small:03} INFO {word}.worker: request {number} done in {size} ms",
    "I{time:%m%d %H:%M:%S}.{number:06} 1 controller.go:{port}] Successfully synced 'default/{word}-{small}'",
    "{time:%Y-%m-%d %H:%M:%S}.{small:03} UTC [{number}] LOG:  checkpoint complete: wrote {size} buffers ({small}%)",
)
_WORDS = (
    "admin",
    "backup",
    "billing",
    "cache",
    "index",
    "mail",
    "orders",
    "proxy",
    "reports",
    "search",
    "users",
    "web",
)


def main(arguments: list[str] | None = None) -> int:
    """Write both parts, and print what they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder with {' or '.join(_ARTICLES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and validation.jsonl")
    parser.add_argument("--characters", type=int, default=12_000_000, help="size of the training part")
    parser.add_argument(
        "--duplicates", type=float, default=0.5, help="share of articles that are copies of an earlier one"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        parts = mix(options.data, characters=options.characters, duplicates=options.duplicates, seed=options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        for part, documents in parts.items():
            lines = "".join(json.dumps({"text": text, "source": source}) + "\n" for source, text in documents)
            write_whole(options.out / f"{part}.jsonl", partial(Path.write_text, data=lines, encoding="utf-8"))
    except (ValueError, OSError, ImportError) as error:
        print(f"redundant_text: {error}", file=sys.stderr)
        return 2
    if options.data is None:
        print("Without --data there are no articles: files of Python's standard library are copied in their place.")
    print("\n".join(table(parts)))
    return 0


def mix(data: Path | None, *, characters: int, duplicates: float, seed: int) -> Parts:
    """The documents of both parts, each in random order.

    Args:
        data: Folder with a folder of articles; without it the library's files are copied instead.
        characters: Size of the training part, about; a source that has too little gives all it has.
        duplicates: Share of the copied source's documents that are copies of an earlier one.
        seed: Seed of which documents are used and copied, of the logs, and of the order.
    """
    if characters < 1 or not 0 <= duplicates <= LARGEST_SHARE:
        raise ValueError(
            f"Expected characters of at least 1 and duplicates in [0, {LARGEST_SHARE}], got {characters} and "
            f"{duplicates}; give such numbers."
        )
    library = stdlib_corpus()
    files = [file for file in (*library.train, *library.validation) if len(file) <= _LARGEST_FILE]
    copied = {"articles": read_articles(data)} if data else {"library": files}
    plain = {} if "library" in copied else {"library": files}
    shares = SHARES if data else {**SHARES, "articles": 0.0, "library": SHARES["articles"] + SHARES["library"]}
    law = copies_law(duplicates)
    licences = [*installed_licences(), *headers(files)]
    parts: Parts = {}
    for part, size in (("train", characters), ("validation", round(characters * _VALIDATION))):
        draw = random.Random(f"{seed} {part}")
        weights = law if part == "train" else copies_law(0.0)
        streams: dict[str, Iterable[str]] = {
            **{name: repeated(_of_part(texts, part, draw), weights, draw) for name, texts in copied.items()},
            **{name: _of_part(texts, part, draw) for name, texts in plain.items()},
            "licences": (draw.choice(licences) for _ in repeat(None)),
            "logs": logs(draw),
        }
        documents = [(name, text) for name, texts in streams.items() for text in filled(texts, shares[name] * size)]
        draw.shuffle(documents)
        parts[part] = documents
    return parts


def read_articles(data: Path) -> list[str]:
    """The articles of the first folder of them that is there.

    Raises:
        FileNotFoundError: If there is none.
    """
    for name, border in _ARTICLES.items():
        for path in sorted((data / name).glob("train.txt*")):
            return [article.strip() for article in border.split(formats.read_text(path)) if article.strip()]
    wanted = " or ".join(f"{name}/train.txt(.zst)" for name in _ARTICLES)
    found = "is no folder" if not data.is_dir() else "has neither"
    raise FileNotFoundError(f"{data}: expected a folder with {wanted}, but it {found}; leave --data out to do without")


def installed_licences() -> list[str]:
    """The licence files of every package installed here, alike ones as often as they are there."""
    paths = {
        str(file.locate())
        for package in metadata.distributions()
        for file in package.files or ()
        if any(part.endswith(".dist-info") for part in file.parts) and _LICENCE.search(file.name)
    }
    return [Path(path).read_text(encoding="utf-8", errors="replace") for path in sorted(paths) if Path(path).is_file()]


def headers(files: Iterable[str]) -> list[str]:
    """The comments about rights that source files begin with."""
    found = (match[0] for match in map(_HEADER.match, files) if match)
    return [header for header in found if _ABOUT_RIGHTS.search(header)]


def logs(draw: random.Random) -> Iterator[str]:
    """Logs without end, each of one program."""
    while True:
        template, time = draw.choice(_LOGS), datetime(2024, 1, 1) + timedelta(seconds=draw.randrange(10**8))
        lines = []
        for _ in range(draw.choice(_LOG_LINES)):
            time += timedelta(seconds=draw.randrange(90))
            fields = {
                "number": draw.randrange(100_000),
                "port": draw.randrange(1024, 65_536),
                "small": draw.randrange(100),
            }
            fields |= {"size": draw.randrange(20_000), "status": draw.choice((200, 200, 200, 304, 404, 500))}
            ip = ".".join(str(draw.randrange(1, 255)) for _ in range(4))
            lines.append(template.format(time=time, ip=ip, word=draw.choice(_WORDS), **fields))
        yield "\n".join(lines)


def copies_law(duplicates: float) -> list[float]:
    """Weights of 1 to `MOST_COPIES` copies: a power law, as Zipf's, whose exponent gives that share of duplicates."""
    low, high = -40.0, 40.0
    for _ in range(60):
        exponent = (low + high) / 2
        weights = [copies**-exponent for copies in range(1, MOST_COPIES + 1)]
        mean = sum(copies * weight for copies, weight in enumerate(weights, 1)) / sum(weights)
        low, high = (exponent, high) if 1 - 1 / mean > duplicates else (low, exponent)
    return weights


def repeated(documents: Iterable[str], weights: list[float], draw: random.Random) -> Iterator[str]:
    """Every document as often as the law draws."""
    for document in documents:
        yield from repeat(document, draw.choices(range(1, len(weights) + 1), weights)[0])


def filled(documents: Iterable[str], characters: float) -> Iterator[str]:
    """Documents until they have that many characters."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document


def table(parts: Parts) -> list[str]:
    """Lines with the size of every source in both parts, and the share of documents that are there already."""
    lines = [f"{'part':11}{'source':10}{'documents':>10}{'characters':>12}{'share':>8}{'duplicates':>12}"]
    for part, documents in parts.items():
        whole = sum(len(text) for _, text in documents)
        for name in (*SHARES, "all"):
            texts = [text for source, text in documents if name in (source, "all")]
            if texts:
                size, same = sum(map(len, texts)), 1 - len(set(texts)) / len(texts)
                lines.append(f"{part:11}{name:10}{len(texts):10,}{size:12,}{size / whole:8.1%}{same:12.1%}")
    return lines


def _of_part(documents: Iterable[str], part: str, draw: random.Random) -> list[str]:
    """The distinct documents of a part in random order; a text is held out or not by its hash alone."""
    chosen = [text for text in dict.fromkeys(documents) if held_out(text) == (part == "validation")]
    draw.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
