"""Redundant text: the same each time, as redundant as asked, and none of its held-out articles in training."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from earlysift.pretrain.corpus import read_corpus

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZE = 600_000


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("redundant_text")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like that of the corpora, with 900 articles; one in three is there twice."""
    folder = tmp_path_factory.mktemp("data")
    articles = [f" = Article {n} = \n \n" + f" Its number is {n} . \n = = Part = = \n" * 10 for n in range(900)]
    (folder / "wikitext-2").mkdir()
    (folder / "wikitext-2" / "train.txt").write_text("\n".join([*articles, *articles[::3]]))
    return folder


@pytest.fixture(scope="module")
def parts(recipe, data):
    return recipe.mix(data, characters=SIZE, duplicates=0.5, seed=0)


def of(documents, source):
    return [text for name, text in documents if name == source]


def test_the_same_inputs_give_the_same_bytes_and_another_seed_others(recipe, data, tmp_path, capsys):
    written, printed = {}, {}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        command = ["--data", str(data), "--out", str(tmp_path / name), "--characters", "100000", "--seed", str(seed)]
        assert recipe.main(command) == 0
        written[name] = [(tmp_path / name / f"{part}.jsonl").read_bytes() for part in ("train", "validation")]
        printed[name] = capsys.readouterr().out
    assert (written["one"], printed["one"]) == (written["two"], printed["two"])
    assert all(one != other for one, other in zip(written["one"], written["other"], strict=True))


def test_no_held_out_article_or_source_file_is_in_training_and_each_comes_once(parts):
    for source in ("articles", "library"):
        train, validation = (of(parts[part], source) for part in ("train", "validation"))
        assert len(validation) == len(set(validation)) > 0
        assert set(validation).isdisjoint(train)


def test_both_parts_hold_the_same_mix_with_boilerplate(recipe, parts):
    for part, size, error in (("train", SIZE, 0.15), ("validation", SIZE / 20, 0.6)):
        for source, share in recipe.SHARES.items():
            found = sum(map(len, of(parts[part], source)))
            assert found >= share * size, (part, source)
            if source in ("articles", "logs"):  # whose documents are short
                assert found == pytest.approx(share * size, rel=error), (part, source)
    assert set(of(parts["validation"], "logs")).isdisjoint(of(parts["train"], "logs"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
def test_that_share_of_the_articles_are_copies_and_none_comes_more_than_twenty_times(recipe, data, share):
    articles = of(recipe.mix(data, characters=SIZE, duplicates=share, seed=0)["train"], "articles")
    copies = Counter(Counter(articles).values())
    assert 1 - len(set(articles)) / len(articles) == pytest.approx(share, abs=0.06)
    assert max(copies) <= 20
    if 0 < share <= 0.5:
        assert copies[1] > copies[2] > copies[4]
    weights = recipe.copies_law(share)
    mean = sum(count * weight for count, weight in enumerate(weights, 1)) / sum(weights)
    assert 1 - 1 / mean == pytest.approx(share, abs=1e-6)
    ratios = [weights[2 * n - 1] / weights[n - 1] for n in (1, 3, 10)]  # a power law: doubling always costs the same
    assert ratios == pytest.approx([ratios[0]] * 3)


def test_articles_are_whole_and_begin_with_their_title(recipe, data):
    articles = recipe.read_articles(data)
    assert len(articles) == 1200
    assert all(article.startswith("= Article") and article.count("= Part =") == 10 for article in articles)


def test_a_comparison_reads_what_was_written(recipe, data, tmp_path):
    pytest.importorskip("datasets")
    assert recipe.main(["--data", str(data), "--out", str(tmp_path), "--characters", "60000"]) == 0
    corpus = read_corpus(tmp_path)
    for part in ("train", "validation"):
        lines = (tmp_path / f"{part}.jsonl").read_text().splitlines()
        assert getattr(corpus, part) == [json.loads(line)["text"] for line in lines]


def test_without_data_the_library_is_copied_which_it_says_with_a_table_of_every_source(recipe, tmp_path, capsys):
    assert recipe.main(["--out", str(tmp_path), "--characters", "400000"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Without --data there are no articles")
    assert [line.split()[:2] for line in lines[1:]] == [
        [part, source] for part in ("train", "validation") for source in ("library", "licences", "logs", "all")
    ]
    documents = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    texts = [document["text"] for document in documents if document["source"] == "library"]
    shown = lines[1].split()
    assert (int(shown[2]), int(shown[3].replace(",", ""))) == (len(texts), sum(map(len, texts)))
    assert shown[5] == f"{1 - len(set(texts)) / len(texts):.1%}"
    assert len(set(texts)) < len(texts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--data", "nowhere"), "nowhere: expected a folder with wikipedia-en/train.txt(.zst) or wikitext-2/train.txt"),
        (("--data", "."), "(.zst), but it has neither; leave --data out to do without"),
        (("--duplicates", "0.95"), "duplicates in [0, 0.9], got 12000000 and 0.95"),
        (("--characters", "0"), "Expected characters of at least 1"),
    ],
)
def test_what_cannot_be_mixed_is_one_line_and_nothing_is_written(recipe, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert recipe.main([*given, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
