"""Corrupted model files: the inputs are the same for a seed, and a sample of them does no harm."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz import child, corruptions
from tests.fuzz.__main__ import GOOD
from tests.fuzz.models import directories, gguf_files

SEED, LIMIT = 7, 20.0


def test_inputs_are_the_same_for_a_seed_and_differ_from_what_is_whole():
    inputs = [corruptions.build(SEED, number) for number in range(300)]
    assert inputs[:30] == [corruptions.build(SEED, number) for number in range(30)]
    assert corruptions.build(SEED + 1, 0) != inputs[0]
    whole = [*directories(), *({"model.gguf": parts.joined()} for parts in gguf_files())]
    assert sum(files in whole for _, files in inputs) < 20
    kinds = {told.partition(":")[0] for told, _ in inputs}
    assert kinds >= {"GGUF", "config.json", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("number", range(len(gguf_files())))
def test_what_is_whole_loads(tmp_path: Path, number: int):
    assert child.outcome(tmp_path, {"model.gguf": gguf_files()[number].joined()})[0] == "loaded"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("expected {folder}/config.json to be whole, got less"), "refused"),
        (ValueError("expected a whole file, got less"), "raw"),
        (ValueError("{folder}: bad"), "raw"),
        (KeyError("{folder}: expected a, got b"), "raw"),
        (type("Panic", (BaseException,), {})("expected"), "raw"),
        (MemoryError(), "memory"),
        (None, "loaded"),
    ],
)
def test_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, kind: str
):
    def load(folder: Path) -> None:
        if error is not None:
            raise type(error)(*(str(x).format(folder=folder) for x in error.args))

    monkeypatch.setattr(child, "load_and_use", load)
    assert child.outcome(tmp_path, {"a": b"b"})[0] == kind


CHILD = """
import json, os, signal, sys, time
say = lambda **line: print(json.dumps(line), flush=True)
say(begun=None)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    say(begun=number, told="x")
    if number in (2, 6):
        os.kill(os.getpid(), 9 if number == 2 else signal.SIGXCPU)
    if number == 4:
        time.sleep(60)
    say(ended=number, kind="memory" if number == 5 else "refused", why="")
    if number == 5:
        break
"""


def test_a_child_that_dies_hangs_or_ends_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(command, "CHILD", [sys.executable, str(tmp_path / "child.py")])
    monkeypatch.setattr(command, "SECONDS", 3.0)
    found = list(command.fuzz(SEED, 8))
    assert [one.number for one in found] == list(range(8))
    assert {one.number: one.kind for one in found if one.kind != "refused"} == {
        **{2: "died", 4: "hung", 5: "memory", 6: "hung"}
    }


@pytest.mark.slow
def test_corrupted_files_are_refused_by_name_or_do_no_harm():
    """About 200 of them, as many as 20 seconds allow."""
    begun, found = time.monotonic(), []
    for one in command.fuzz(SEED, 200):
        found.append(one)
        assert one.kind in GOOD, f"{one.told}: {one.why}\nagain: {command.replay(SEED, one.number)}"
        if time.monotonic() - begun > LIMIT and len(found) > 20:
            break
    assert {one.kind for one in found} == set(GOOD)
