"""What turns documents written for GitHub into a site, and what a built site must hold.

MkDocs calls these functions. They change no file of the repository: README.md, CONTRIBUTING.md and CHANGELOG.md become
pages, links that leave docs/ lead to copies below files/, and Markdown that GitHub and Python-Markdown read differently
is put so that both read the same. A site on which a link, an anchor, a picture or a public name is missing, or which
asks another host for anything, is an error.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
COPIES = "files"

_FENCED = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)((?:#[^)\s]*)?)\)")
_SOURCE = re.compile(r'\b(src|srcset)="(?!https?://)([^"]+)"')
_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img alt="([^"]*)" src="([^"]+)" width="(\d+)">\s*</picture>'
)
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "video": "src", "audio": "src"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and copies of every file that a page links to."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    pages = [(page, page.content_string) for page in files.documentation_pages()]
    for path in sorted({path for page, text in pages for path in _linked(text, _folder(page.src_uri))}):
        if (ROOT / path).is_dir():
            held = sorted(inner for inner in (ROOT / path).iterdir() if inner.is_file())
            listed = "\n".join(f"- [{inner.name}]({posixpath.basename(path)}/{inner.name})" for inner in held)
            listing = File.generated(config, f"{COPIES}/{path}.md", content=f"# {path}\n\n{listed}\n")
            listing.inclusion = type(listing.inclusion).NOT_IN_NAV
            files.append(listing)
        else:
            held = [ROOT / path]
        for inner in held:
            name = f"{COPIES}/{inner.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(inner)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to where files lie on the site, and put blocks so that Python-Markdown finds them."""
    name, folder = page.file.src_uri, _folder(page.file.src_uri)
    if name.startswith(f"{COPIES}/"):
        return markdown
    here = posixpath.dirname(name) or "."

    def link(match: re.Match[str]) -> str:
        return f"]({posixpath.relpath(_place(match[1], folder), here)}{match[2]})"

    def source(match: re.Match[str]) -> str:
        return f'{match[1]}="{posixpath.relpath(_place(match[2], folder), here)}"'

    parts = _FENCED.split(markdown)
    for at in range(0, len(parts), 2):  # what is not fenced code
        text = _SOURCE.sub(source, _LINK.sub(link, parts[at]))
        text = _PICTURE.sub(_both_themes, text)
        text = text.replace("<details>", '<details markdown="1">')
        parts[at] = _as_python_markdown(text)
    return "".join(parts)


def on_post_build(config: MkDocsConfig) -> None:
    """Raise if the built site lacks anything that it names, or asks another host for anything."""
    site = Path(config.site_dir)
    pages = {path.relative_to(site).as_posix(): _Seen(path.read_text("utf-8")) for path in site.rglob("*.html")}
    problems = [problem for name, page in pages.items() for problem in _problems(name, page, pages, site)]
    documented = set().union(*(page.ids for name, page in pages.items() if name.startswith("api/")))
    problems += [
        f"docs/api: earlysift.{name} is public and has no page. Add '::: earlysift.{name}' to one of them."
        for name in public_names()
        if f"earlysift.{name}" not in documented
    ]
    if problems:
        raise PluginError("The site is not whole:\n" + "\n".join(problems))


def public_names() -> list[str]:
    """The names of `earlysift.__all__`, without importing torch."""
    tree = ast.parse((ROOT / "src" / "earlysift" / "__init__.py").read_text("utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return list(names)


def _leaf(entry: Any) -> list[str]:
    """The page that an entry of the navigation names, if it is no section."""
    value = next(iter(entry.values())) if isinstance(entry, dict) else entry
    return [value] if isinstance(value, str) else []


def _folder(name: str) -> str:
    """The folder of the repository from which the links of a page are read."""
    return "." if name in PAGES.values() else posixpath.join("docs", posixpath.dirname(name))


def _place(path: str, folder: str) -> str:
    """Where a file that a page links to lies on the site, from its root."""
    target = posixpath.normpath(posixpath.join(folder, path))
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{COPIES}/{target}.md" if (ROOT / target).is_dir() else f"{COPIES}/{target}"


def _linked(text: str, folder: str) -> Iterator[str]:
    """Files outside docs/ that a page links to, from the root of the repository."""
    for path, _anchor in _LINK.findall("".join(_FENCED.split(text)[::2])):
        target = posixpath.normpath(posixpath.join(folder, path))
        if target not in PAGES and not target.startswith(("docs/", "..")) and (ROOT / target).exists():
            yield target


def _both_themes(match: re.Match[str]) -> str:
    """A picture in two themes that follows the switch of the site, not the system's setting."""
    dark, alt, light, width = match.groups()
    images = (
        f'<img alt="{alt}" src="{name}" width="{width}">' for name in (f"{light}#only-light", f"{dark}#only-dark")
    )
    return f'<p class="figure">{"".join(images)}</p>'


def _as_python_markdown(text: str) -> str:
    """Markdown with blank lines before tables and lists, and the indent within a list, that GitHub does not need."""
    lines: list[str] = []
    begun = ""  # the first line since the last blank one
    for line in re.sub(r"^  (?=\S)", "    ", text, flags=re.MULTILINE).split("\n"):
        before = lines[-1] if lines else ""
        table = line.lstrip().startswith("|") and not before.lstrip().startswith("|")
        listed = line.startswith("- ") and (begun.startswith(" ") or not before.startswith(("- ", " ")))
        if before.strip() and (table or listed or before.startswith("<!--")):
            lines.append("")
        begun = line if not lines or not lines[-1].strip() else begun
        lines.append(line)
    return "\n".join(lines)


class _Seen(HTMLParser):
    """A page: the ids that it has, where it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of one element."""
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values and values.get("rel") != "canonical":
            self.loads.append(values["href"])
        if _LOADS.get(tag) in values:
            self.loads.append(values[_LOADS[tag]])


def _problems(name: str, page: _Seen, pages: dict[str, _Seen], site: Path) -> Iterator[str]:
    """What one page of the site names and the site does not have."""
    for url in page.loads:
        if urlsplit(url).scheme not in ("", "data") or url.startswith("//"):
            yield f"{name} asks another host for {url}"
    for url in (*page.links, *page.loads):
        parts = urlsplit(url)
        if parts.scheme or url.startswith("//") or name == "404.html":
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
        if path in (".", ""):
            path = "index.html"
        if not (site / path).is_file():
            yield f"{name} names {url}, which is not there"
        elif parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].ids:
            yield f"{name}: {path} has no anchor {parts.fragment}"
