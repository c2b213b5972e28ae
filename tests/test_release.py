"""What a release rests on: bounds and exact versions that agree, and files about the project in their formats."""

import importlib.util
import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def canonical(name):
    """A project's name as the index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def exact_versions(text):
    """Name to version of a constraint file whose every line is exact."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), f"not an exact version: {line}"
    found = {canonical(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}
    assert len(found) == len(lines), "a name stands there twice"
    return found


def asked():
    """Every requirement of pyproject.toml: of the build, the library, its extras and the groups."""
    project = PYPROJECT["project"]
    lists = [
        PYPROJECT["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PYPROJECT["dependency-groups"].values(),
    ]
    return [Requirement(line) for lines in lists for line in lines if isinstance(line, str)]


@pytest.fixture(scope="module")
def check():
    """The module release/check.py."""
    spec = importlib.util.spec_from_file_location("check_release", ROOT / "release" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exact_versions_satisfy_the_bounds():
    exact = exact_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    for requirement in asked():
        if canonical(requirement.name) != "earlysift":
            assert exact[canonical(requirement.name)] in requirement.specifier, str(requirement)


@pytest.mark.parametrize("line", ["torch>=2.13", "torch", "torch==2.13.*", "torch==2.13.0\ntorch==2.13.1"])
def test_a_constraint_that_is_not_exact_is_found(line):
    with pytest.raises(AssertionError):
        exact_versions(line)


def test_every_requirement_has_a_lower_bound_and_no_other_and_the_oldest_versions_are_these(check):
    for requirement in asked():
        if canonical(requirement.name) != "earlysift":
            assert [each.operator for each in requirement.specifier] == [">="], str(requirement)
    bounds = check.lower_bounds()
    assert f"torch=={bounds['torch']}" in check.VERSIONS["oldest"]()
    assert bounds.keys() >= {"torch", "transformers", "tyro"}
    for requirement in check.requirements():  # the same package in two extras has the same bound
        assert requirement.specifier == f">={bounds[requirement.name]}"


def test_extras_are_all_in_all():
    extras = PYPROJECT["project"]["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.name == "earlysift"
    assert everything.extras == extras.keys() - {"all"}


def test_every_environment_has_a_loop_and_every_missing_extra_a_sentence(check):
    names = {where: {each.name for each in check.CHECKS if where in each.where} for where in check.EXTRAS}
    everywhere = {"import, and every public name", "a loop over pools", "earlysift --help"}
    assert all(everywhere <= names[where] for where in (check.BASE, check.CLI, check.ALL))
    assert sum("one sentence" in name for has in names.values() for name in has) == 5
    assert not any("one sentence" in name for name in names[check.ALL])


def test_every_file_of_the_recipes_is_run_with_the_extras_that_the_page_names(check):
    copied = {each.copied: each.where for each in check.CHECKS if each.copied}
    assert sorted(copied) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.py"))
    page = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[.+?\]\(#\w+\) \| \d+ \| `(.+?)` \|", page, flags=re.MULTILINE)
    needed = [(check.EXTRAS[where], *check.BESIDES.get(where, ())) for where in check.RECIPES.values()]
    assert named == ["`, `".join(names) for names in needed]
    for file, where in copied.items():
        assert where == (check.RECIPES[Path(file).parent.name],)


def test_the_matrix_has_exact_versions_but_for_what_is_newest_and_runs_tests_that_there_are(check, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "release")
    matrix = importlib.import_module("matrix")
    oldest, pinned = ("\n".join(check.VERSIONS[age]()) for age in ("oldest", "pinned"))
    for cell, ages in matrix.CELLS.items():
        lines = matrix.constraints_of(cell)
        exact_versions("\n".join(lines))
        for name, age in zip(("torch", "transformers"), ages, strict=True):
            found = [line for line in lines if line.startswith(f"{name}==")]
            expected = {"oldest": oldest, "pinned": pinned, "newest": ""}[age]
            assert found == re.findall(rf"^{name}==.*$", expected, flags=re.MULTILINE)
    for test in matrix.TESTS:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


# CITATION.cff

FIELDS = {"cff-version", "message", "title", "type", "license", "version", "authors"}
PAPER_FIELDS = {"type", "title", "authors", "year", "collection-title"}
"""Fields that format 1.2.0 asks for, or that a citation needs."""


def citation_problems(text):
    """What is missing in a citation file, or not as the format has it."""
    fields = yaml.safe_load(text)
    paper = fields.get("preferred-citation", {})
    problems = [f"lacks {name}" for name in FIELDS - fields.keys()]
    problems += [f"preferred-citation lacks {name}" for name in PAPER_FIELDS - paper.keys()]
    if fields.get("cff-version") != "1.2.0":
        problems.append("cff-version is not 1.2.0")
    if fields.get("type") not in ("software", "dataset"):
        problems.append("type is neither software nor dataset")
    for author in (*fields.get("authors", ()), *paper.get("authors", ())):
        if not ({"name"} <= author.keys() or {"family-names", "given-names"} <= author.keys()):
            problems.append(f"not an entity and not a person: {author}")
    if not isinstance(paper.get("year"), int):
        problems.append("year is not a whole number")
    problems += [
        f"not an identifier: {each}"
        for each in paper.get("identifiers", ())
        if each.get("type") not in ("doi", "url", "swh", "other") or not each.get("value")
    ]
    return problems


def test_the_citation_is_valid_and_of_this_version_and_licence():
    assert citation_problems(CITATION) == []
    fields, project = yaml.safe_load(CITATION), PYPROJECT["project"]
    assert (fields["title"], str(fields["version"]), fields["license"]) == (
        *(project["name"], project["version"], project["license"]),
    )


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("cff-version: 1.2.0", "cff-version: 1.1.0"),
        ("message: ", "massage: "),
        ("type: software", "type: program"),
        ("given-names", "first-names"),
        ("year: 2024", "year: in 2024"),
        ("type: other", "type: arxiv"),
    ],
)
def test_the_check_of_the_citation_finds(good, bad):
    assert good in CITATION
    assert citation_problems(CITATION.replace(good, bad))


# CHANGELOG.md

KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def changelog_problems(text):
    """What is not as Keep a Changelog has it: sections newest first, kinds by name and once, entries as a list."""
    title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    problems = [] if title.startswith("# Changelog\n") and "keepachangelog.com" in title else ["no title, or no format"]
    headings = [section.partition("\n")[0] for section in sections]
    if headings[:1] != ["[Unreleased]"]:
        problems.append("the first section is not [Unreleased]")
    released = []
    for heading in headings[1:]:
        named = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading)
        if named:
            released.append((Version(named[1]), date.fromisoformat(named[2])))
        else:
            problems.append(f"not a version and its date: {heading}")
    if released != sorted(released, reverse=True):
        problems.append("versions do not fall")
    for heading, section in zip(headings, sections, strict=True):
        kinds = re.findall(r"^### (.*)$", section, flags=re.MULTILINE)
        problems += [f"{heading}: {kind} is none of {', '.join(KINDS)}" for kind in kinds if kind not in KINDS]
        if len(set(kinds)) < len(kinds):
            problems.append(f"{heading}: a kind stands there twice")
        problems += [
            f"{heading}: neither an entry nor its next line: {line}"
            for line in section.splitlines()[1:]
            if line and not re.match(r"### |- |  \S", line)
        ]
    return problems


def test_the_changelog_keeps_its_format():
    assert changelog_problems(CHANGELOG) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("# Changelog", "# Changes"),
        ("## [Unreleased]", "## Unreleased"),
        ("### Added", "### New"),
        ("### Added", "### Changed"),
        ("\n- `Sifter`", "\n* `Sifter`"),
        ("## [Unreleased]", "## [Unreleased]\n\n## [0.1.0]"),
        ("## [Unreleased]", "## [Unreleased]\n\n## [0.1.0] - 2026-11-01\n\n## [0.2.0] - 2026-11-02"),
    ],
)
def test_the_check_of_the_changelog_finds(good, bad):
    assert good in CHANGELOG
    assert changelog_problems(CHANGELOG.replace(good, bad, 1))


def test_the_changelog_has_a_section_of_every_released_version():
    version = PYPROJECT["project"]["version"]
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", CHANGELOG, flags=re.MULTILINE)
    assert not released or released[0] == version  # the first version is in [Unreleased] until it is released
