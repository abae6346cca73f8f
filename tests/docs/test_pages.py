"""The pages hold together: links, the navigation, a page for every sampler."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from samplers import registry

from . import pages

HOOK = pages.hook()
WRITTEN = sorted(pages.DOCS.glob("*.md"))


@functools.cache
def made() -> set[str]:
    """Names of the pages that the hook makes."""
    notebooks = {f"notebooks/{path.stem}.md" for path in HOOK.NOTEBOOKS.glob("*.py")}
    return {"index.md", "samplers.md", *HOOK.api(), *notebooks}


def broken(page: Path, generated: set[str]) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in pages.links(page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        if target.exists():
            if anchor and anchor not in pages.anchors(target.read_text()):
                found.append(link)
        elif name not in generated:
            found.append(link)
    return found


@pytest.mark.parametrize("page", [pages.README, *WRITTEN], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    assert broken(page, made()) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "a.md"
    page.write_text("# A b\n[x](#a-b) [y](#b) [z](c.md) [u](api/ppl.lm.md) `[v](d.md)`\n")
    assert broken(page, {"api/ppl.lm.md"}) == ["#b", "c.md"]


def test_every_sampler_has_a_page_and_stands_in_the_table():
    entries, api = registry.entries(), HOOK.api()
    table = HOOK.sampler_table(entries)
    for entry in entries:
        page = HOOK.page_of(entry.name.rpartition(".")[0])
        assert page in api and f"]({page}#{entry.name}) | {entry.guarantee.name} |" in table


def test_every_name_of_a_package_has_a_page():
    for package in ("ppl", "models"):
        listed = {HOOK.page_of(name) for name in HOOK.modules(package)}
        for home in HOOK.homes(package):
            inside = home.replace(".", "/")
            if (pages.ROOT / f"{inside}.py").exists():
                assert HOOK.page_of(home) in listed, home


def test_the_navigation_has_every_page():
    nav = (pages.ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w.]+\.md", nav))
    assert listed == {"index.md", "samplers.md", *(page.name for page in WRITTEN)}


@pytest.mark.parametrize("page", [pages.README, *WRITTEN], ids=lambda page: page.name)
def test_the_code_can_be_parsed(page: Path):
    for block in pages.blocks(page.read_text()):
        ast.parse(block)


def test_the_readme_is_one_page():
    assert pages.README.read_text().count("\n") <= 130


def test_every_task_has_a_snippet_and_every_snippet_a_task():
    text = (pages.DOCS / "choosing.md").read_text()
    rows = pages.rows(text)
    assert len(rows) >= 20
    assert [row.anchor for row in rows] == list(pages.sections(text))
    assert [pages.slug(row.task) for row in rows] == [row.anchor for row in rows]
    assert all(pages.sections(text).values())
