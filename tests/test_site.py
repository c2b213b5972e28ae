"""The site shows every page and every public name, and what is broken on it is noticed."""

import importlib.util
import re
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import earlysift

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTED = set(re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in DOCS.glob("api/*.md")), flags=re.M))


class _Plain(yaml.SafeLoader):
    """mkdocs.yml as data; a Python function in it is its name."""


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, name, node: name)


def pages_of(nav):
    """The files that a navigation names, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def navigation():
    """The files that the site's navigation names, in order."""
    return pages_of(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Plain)["nav"])


def test_navigation_names_every_page_once():
    named = navigation()
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    from_root = {"index.md", "contributing.md", "changelog.md", "security.md"}
    assert sorted(named) == sorted(there | from_root)


def test_every_public_name_is_on_an_api_page():
    assert [name for name in earlysift.__all__ if f"earlysift.{name}" not in DOCUMENTED] == []


def test_every_module_that_a_page_imports_from_is_on_an_api_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    modules = set(re.findall(r"^from earlysift\.(\S+) import", text, flags=re.M))
    assert len(modules) > 5
    assert [name for name in modules if not any(page.startswith(f"earlysift.{name}") for page in DOCUMENTED)] == []


def test_the_figure_of_the_idea_differs_in_colours_alone():
    light, dark = ((DOCS / f"idea-{theme}.svg").read_text(encoding="utf-8") for theme in ("light", "dark"))
    assert light != dark
    drawn = [re.sub(r"<style>.*?</style>", "", picture, flags=re.S) for picture in (light, dark)]
    assert drawn[0] == drawn[1]
    assert "http" not in drawn[0].replace("http://www.w3.org/2000/svg", "")


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the site's generator is not installed: make pages")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "website" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_reads_the_public_names_that_there_are(hooks):
    assert hooks.public_names() == earlysift.__all__


def test_markdown_for_github_reads_the_same_on_the_site(hooks):
    written = "text\n| a |\n|---|\n| b |\n\n- one\n  more\n\n  a paragraph of it\n- two\n<!-- here -->\n| c |\n|---|"
    expected = "text\n\n| a |\n|---|\n| b |\n\n- one\n    more\n\n    a paragraph"
    expected += " of it\n\n- two\n<!-- here -->\n\n| c |\n|---|"
    assert hooks._as_python_markdown(written) == expected


@pytest.fixture
def site(hooks, tmp_path):
    """A function that writes a small whole site, with this in one of its pages, and checks it."""

    def check(body, names=earlysift.__all__):
        (tmp_path / "api").mkdir(exist_ok=True)
        (tmp_path / "picture.svg").write_text("<svg/>")
        (tmp_path / "index.html").write_text(f'<h1 id="top">A</h1><a href="api/all.html#earlysift.Sifter">S</a>{body}')
        (tmp_path / "api" / "all.html").write_text("".join(f'<h2 id="earlysift.{name}"></h2>' for name in names))
        hooks.on_post_build(config=type("Config", (), {"site_dir": str(tmp_path)}))

    return check


def test_a_whole_site_passes(site):
    site('<img src="picture.svg#only-light"><a href="https://example.org">elsewhere</a><a href="#top">up</a>')


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">x</a>', "index.html names gone.html, which is not there"),
        ('<a href="#gone">x</a>', "index.html: index.html has no anchor gone"),
        ('<a href="api/all.html#gone">x</a>', "index.html: api/all.html has no anchor gone"),
        ('<img src="gone.svg">', "index.html names gone.svg, which is not there"),
        ('<script src="https://cdn.example/x.js"></script>', "asks another host for https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', "asks another host for //fonts.example/a.css"),
    ],
)
def test_a_site_that_lacks_something_is_an_error(site, body, problem):
    with pytest.raises(Exception, match=re.escape(problem)):
        site(body)


def test_a_public_name_without_a_page_is_an_error(site):
    with pytest.raises(Exception, match=r"earlysift\.Sifter is public and has no page"):
        site("", names=[name for name in earlysift.__all__ if name != "Sifter"])


@pytest.fixture(scope="module")
def address(hooks, tmp_path_factory):
    """Where the site is served, built from the repository."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the generator and its plugins
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture
def phone(address, browser):
    """A function that opens a page of the site on a phone; afterwards it must have asked no other host for anything."""
    asked, contexts = [], []

    def opened(theme):
        contexts.append(browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=theme))
        contexts[-1].set_default_timeout(0)
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(address)] == []


def test_no_page_is_wider_than_a_phone(address, phone):
    page, wide = phone("light"), []
    for name in navigation():
        page.goto(f"{address}/{name.replace('.md', '.html')}")
        if page.evaluate("document.documentElement.scrollWidth") > 390:
            wide.append(name)
    assert wide == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_picture_is_shown_in_the_colours_of_the_page(address, phone, theme):
    page = phone(theme)
    for name, picture in (("start.html", "idea"), ("results.html", "speed-ups"), ("index.html", "verdict")):
        page.goto(f"{address}/{name}")
        shown = page.evaluate(
            "[...document.querySelectorAll('.figure img')].filter(i => i.offsetWidth).map(i => i.src)"
        )
        assert shown == [f"{address}/{picture}-{theme}.svg#only-{theme}"]
