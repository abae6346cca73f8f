"""The HTML page of a run, read back: every particle is there once, lineages replay the history,
text stays text.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.showing import view
from experiments.showing.lineages import ancestry
from experiments.showing.saving import Population
from ppl.sequences import Sequences
from samplers.results import History, Trace

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><!--",
    "a & b",
    "\n",
    "'",
    "{x}",
    "é",
]


class Evil:
    """A tokenizer whose tokens would like to be markup."""

    def decode(self, ids: object) -> str:
        return "".join(EVIL[int(token)] for token in np.asarray(ids))


def made_up(num: int, rounds: int, most: int = 3, seed: int = 0) -> Population:
    """A run that no sampler made: random ancestors, ragged rounds, some particles dead."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, len(EVIL), (rounds, num, most)).astype(np.int32)
    tokens[np.arange(most) >= rng.integers(0, most + 1, (rounds, num))[..., None]] = -1
    ancestors = np.sort(rng.integers(0, num, (rounds, num)), axis=1).astype(np.int32)
    ancestors[0] = np.arange(num)
    log_weights = rng.normal(size=(rounds, num)).astype(np.float32)
    log_weights[rng.random((rounds, num)) < 0.1] = -np.inf
    slots = ancestry(ancestors)
    strings = [np.concatenate([tokens[r, slots[r, i]] for r in range(rounds)]) for i in range(num)]
    strings = [drawn[drawn >= 0] for drawn in strings]
    length = np.array([len(drawn) for drawn in strings], np.int32)
    padded = np.stack(
        [np.pad(drawn, (0, int(length.max()) - len(drawn))) for drawn in strings]
    ).astype(np.int32)
    trace: Any = Trace(  # pyright: ignore[reportArgumentType]
        ess=rng.uniform(1, num, rounds),  # pyright: ignore[reportArgumentType]
        log_z=np.append(np.full(rounds - 1, -3.5), -np.inf),  # pyright: ignore[reportArgumentType]
        resampled=np.arange(rounds) % 2 == 1,  # pyright: ignore[reportArgumentType]
        active=np.full(rounds, num),  # pyright: ignore[reportArgumentType]
    )
    history: Any = History(drawn=tokens, log_weights=log_weights, ancestors=ancestors)  # pyright: ignore[reportArgumentType]
    x: Any = Sequences(padded, length)  # pyright: ignore[reportArgumentType]
    return Population(x, log_weights[-1], -3.5, 0.1, 2, {"tokens": 7}, 0.25, trace, history)


class Page(HTMLParser):
    """Elements with their attributes, the data, and all text outside of it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text, self.data = "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data = self.data or data
        elif self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run() -> Population:
    return made_up(num=12, rounds=5)


@pytest.fixture(scope="module")
def page(run: Population) -> Page:
    return Page(view.html(run, Evil(), title=EVIL[0]).page)


def test_every_particle_of_every_round_appears_once(page: Page):
    ids = [attrs.get("id") for tag, attrs in page.elements if tag == "path" and attrs.get("id")]
    assert sorted(str(i) for i in ids) == sorted(f"p{r}_{i}" for r in range(5) for i in range(12))
    rows = [
        str(attrs["data-slots"]).split()
        for tag, attrs in page.elements
        if tag == "tr" and "data-slots" in attrs
    ]
    slots = [int(slot) for row in rows for slot in row]
    assert sorted(slots) == sorted([*range(12), *range(12)]), "merged, and one by one"


def test_lines_begin_where_the_ancestor_ends(page: Page, run: Population):
    lines = {
        str(attrs["id"]): str(attrs["d"])
        for tag, attrs in page.elements
        if tag == "path" and "id" in attrs
    }

    def ends(line: str) -> tuple[str, str]:
        first = line[1:].split("C")[0].split("H")[0]
        last = (
            " ".join(line.split("C")[1].split()[-2:])
            if "C" in line
            else f"{line.split('H')[1]} {first.split()[1]}"
        )
        return first, last

    assert run.history is not None
    for r in range(1, 5):
        for i, parent in enumerate(np.asarray(run.history.ancestors[r])):
            assert ends(lines[f"p{r}_{i}"])[0] == ends(lines[f"p{r - 1}_{parent}"])[1]


def test_the_lineage_of_a_final_particle_replays_the_history(page: Page, run: Population):
    data = json.loads(page.data)
    for i, row in enumerate(np.asarray(run.sequences.tokens)):
        text, slot = "", i
        for r in range(data["rounds"] - 1, -1, -1):
            text = data["words"][data["said"][r][slot]] + text
            slot = data["ancestors"][r][slot]
        assert text == Evil().decode(row[: run.sequences.length[i]])
    weights = np.array(data["weights"])
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-2)
    assert (
        run.history is not None and ((weights == 0) == np.isneginf(run.history.log_weights)).all()
    )


def test_the_script_follows_lineages_as_we_do(run: Population, page: Page):
    """The page's own functions, run by node where there is one."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    functions = view.SCRIPT[
        view.SCRIPT.index("function past") : view.SCRIPT.index("function light")
    ]
    asked = "console.log(JSON.stringify([past(4,3),past(2,7),future(1,4)]))"
    code = f"const data={page.data};{functions};{asked}"
    out = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True).stdout
    full, part, after = json.loads(out)
    assert run.history is not None
    ancestors = np.asarray(run.history.ancestors)
    assert full == [[r, int(slot)] for r, slot in enumerate(ancestry(ancestors)[:, 3])]
    assert part == [[r, int(slot)] for r, slot in enumerate(ancestry(ancestors[:3])[:, 7])]
    slots = np.array([ancestry(ancestors[: r + 1])[1] == 4 for r in range(2, 5)])
    assert after == [[int(r) + 2, int(i)] for r, i in np.argwhere(slots)]


def test_text_stays_text(page: Page):
    tags = {tag for tag, _ in page.elements}
    assert "img" not in tags and sum(tag == "script" for tag, _ in page.elements) == 2
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert EVIL[0] in page.text and EVIL[1] in page.text and not page.open


def test_the_page_needs_no_network(page: Page):
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    assert not any(
        name in ("src", "href", "srcset") for _, attrs in page.elements for name in attrs
    )
    assert "url(" not in view.STYLE and "@import" not in view.STYLE


def test_what_a_reader_must_know_is_said(page: Page, run: Population):
    dead = int(np.isneginf(run.log_weights).sum())
    assert dead and f"{dead} of 12 particles are dead" in page.text
    for part in ("NaN or +inf 2 times", "truncated target", "-3.500 ± 0.10", "ESS", "tokens"):
        assert part in page.text


def test_merged_strings_are_sorted_by_weight(run: Population):
    table = view._merged(run, ["a", "b"] * 6)
    rows = [row.split("</td>")[0].split(">")[-1] for row in table.split("<tr")[2:]]
    assert [float(weight) for weight in rows] == sorted(
        (float(weight) for weight in rows), reverse=True
    )
    assert sum(float(weight) for weight in rows) == pytest.approx(1, abs=1e-3)


def test_a_large_run_stays_small():
    assert len(view.html(made_up(num=64, rounds=64, most=1), Evil()).page.encode()) < 1_000_000


def test_a_dead_run_and_one_without_history_have_a_page(run: Population):
    dead = dataclasses.replace(run, log_weights=np.full(12, -np.inf, np.float32), log_z=-np.inf)
    assert "All particles are dead" in Page(view.html(dead, Evil()).page).text
    bare = Page(view.html(dataclasses.replace(run, history=None), Evil()).page)
    assert "history=True" in bare.text and not any(
        attrs.get("id") == "p0_0" for _, attrs in bare.elements
    )
    chosen = dataclasses.replace(run, history=None, trace=None, log_z=None, log_z_std_error=None)
    assert "log Z" not in Page(view.html(chosen, Evil()).page).text


def test_a_notebook_shows_the_saved_page_in_a_frame(run: Population, tmp_path: Path):
    shown = view.html(run, Evil())
    shown.save(tmp_path / "run.html")
    frame = shown._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts"')
    inside = frame[frame.index('srcdoc="') + 8 : frame.rindex('"></iframe>')]
    assert '"' not in inside and unescape(inside) == (tmp_path / "run.html").read_text(
        encoding="utf-8"
    )
