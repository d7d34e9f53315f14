"""The site that `make docs` makes of docs/: it builds strictly, its links lead somewhere, and it fetches nothing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml

from tests.scripts import load_script

pytest.importorskip("zensical", reason="the extra docs is not installed")

ROOT = Path(__file__).parents[1]
FETCHED = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "video"}
"""Tags whose addresses a browser loads by itself."""


def load_builder() -> ModuleType:
    """docs/build.py, which is a script and no part of a package."""
    return load_script(ROOT / "docs" / "build.py", "build_docs")


@pytest.fixture
def builder() -> ModuleType:
    return load_builder()


class Page(HTMLParser):
    """What a page refers to and what it can be referred to by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.headings = 0
        self.comments: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name, value in attrs if name in ("id", "name") and value}
        self.headings += tag == "h1"
        found = [value for name, value in attrs if name in ("href", "src", "data", "srcset") and value]
        if tag in FETCHED and values.get("rel") not in ("prev", "next", "canonical"):
            self.fetched += found
        else:
            self.links += found

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    load_builder().build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def entries(nav: list[object]) -> list[str]:
    """The files that a navigation names."""
    found: list[str] = []
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += entries(value) if isinstance(value, list) else [str(value)]
    return found


def test_every_page_is_in_the_navigation_once(builder: ModuleType, tmp_path: Path) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    nav = entries(yaml.load(builder.stage(tmp_path).read_text(encoding="utf-8"), Loader)["nav"])
    assert sorted(nav) == sorted(place for place in builder.sources().values() if place.endswith(".md"))


def test_every_page_is_built(builder: ModuleType, site: Path) -> None:
    for place in builder.sources().values():
        assert (site / place.replace(".md", ".html")).exists(), place


def test_links_lead_to_pages_and_headings(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links:
            if re.match("https?:|mailto:", link) or path.name == "404.html":  # its links are the server's
                continue
            file, _, fragment = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()) and target.exists(), f"{path.name}: {link}"
            assert not fragment or target.suffix != ".html" or fragment in pages[target].ids, f"{path.name}: {link}"


def test_the_reference_shows_what_it_names(site: Path, pages: dict[Path, Page]) -> None:
    """A name that a function shares with its module would show the module."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        built = (site / "reference" / page.name).with_suffix(".html")
        names = re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(names) <= pages[built].ids, page.name
        assert "doc-module" not in built.read_text(encoding="utf-8"), page.name


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for address in page.fetched:
            assert not re.match("[a-z]+:|//", address), f"{path.name}: {address}"
            assert path.name == "404.html" or (path.parent / unquote(address.partition("?")[0])).exists(), address
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", sheet.read_text(encoding="utf-8")), sheet.name


def test_pages_are_whole(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        text = path.read_text(encoding="utf-8")
        assert page.headings == 1, path.name
        assert not any(re.match(" *(setup|check)", comment) for comment in page.comments), path.name
        for left in ("```", "<p>:::", "<p>|", "\n- ", 'class="mermaid"'):
            assert left not in re.sub(r"<(pre|script|code).*?</\1>", "", text, flags=re.DOTALL), f"{path.name}: {left!r}"


def test_what_is_searched_for_is_found(site: Path) -> None:
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["items"] if "implicit gradient" in entry["text"].lower()}
    assert "theory.html" in found


def test_where_links_lead(builder: ModuleType) -> None:
    places = {ROOT / "docs" / "how-to" / "a.md": "how-to/a.md", ROOT / "README.md": "project/readme.md"}
    page = ROOT / "docs" / "how-to" / "a.md"
    code = "`[c](d.md)`\n```text\n[e](f.md)\n```\n[g](https://h.i) [j](#k)\n"
    text = f"[x](../../README.md#y) [`t`](../../tests/test_site.py) {code}"
    here = '[x](../project/readme.md#y) <span title="tests/test_site.py">`t`</span> '
    assert builder.turned(text, page, places, None) == here + code
    there = "[x](../project/readme.md#y) [`t`](https://git.example/r/blob/main/tests/test_site.py) "
    assert builder.turned(text, page, places, "https://git.example/r") == there + code
    assert builder.turned("a\n\n<!-- setup: z\nimport x\n-->\n\nb\n", page, places, None) == "a\n\n\nb\n"


def test_a_link_to_a_missing_file_stops_the_build(builder: ModuleType) -> None:
    with pytest.raises(builder.SiteError, match=r"docs.a\.md: b\.md leads nowhere"):
        builder.turned("[c](b.md)", ROOT / "docs" / "a.md", {}, None)


def test_a_warning_of_the_generator_stops_the_build(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](#nowhere)\n")
    shutil.copy(ROOT / "docs" / "roles.py", tmp_path / "docs")
    nav = re.compile(r"^nav:\n.*?\n\n", re.DOTALL | re.MULTILINE)
    config = nav.sub("nav: [{Start: index.md}]\n\n", (ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(config)
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "CONFIG", tmp_path / "mkdocs.yml")
    monkeypatch.setattr(builder, "ELSEWHERE", {})
    with pytest.raises(builder.SiteError):
        builder.build(tmp_path / "site")
    assert not (tmp_path / "site").exists()
