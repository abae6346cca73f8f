"""Files that are written together, or alone, are all old or all new wherever the writer stops."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppl import files

NAMES = ("results.json", "arrays.npz", "extra")


def write_together(directory: Path, content: str) -> None:
    with files.together(directory) as fresh:
        for name in NAMES:
            (fresh / name).write_text(content)


def write_alone(directory: Path, content: str) -> None:
    with files.replacing(directory / NAMES[0]) as fresh:
        fresh.write_text(content[:1])
        fresh.write_text(content)


def found(directory: Path) -> set[str | None]:
    paths = [files.latest(directory, name) for name in NAMES]
    return {path.read_text() if path.exists() else None for path in paths}


def interrupted(act: Callable[[], None], line: int) -> bool:
    """Call `act` and interrupt it where it begins its `line`-th line; whether it came so far."""
    left = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in (files.__file__, __file__):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_several_files_are_all_old_or_all_new(tmp_path: Path):
    seen, line = set(), 0
    write_together(tmp_path, "old 0")
    while True:
        line += 1
        [before] = found(tmp_path)
        stopped = interrupted(lambda: write_together(tmp_path, f"new {line}"), line)  # noqa: B023
        [after] = found(tmp_path)
        assert after in (before, f"new {line}")
        seen.add(after == before)
        if not stopped:
            break
    assert seen == {True, False} and line > 30
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)


def test_the_first_files_are_all_there_or_none(tmp_path: Path):
    for line in range(1, 60):
        directory = tmp_path / str(line)
        directory.mkdir()
        interrupted(lambda: write_together(directory, "new"), line)  # noqa: B023
        assert len(found(directory)) == 1


def test_one_file_is_old_or_new_and_nothing_is_left(tmp_path: Path):
    line, stopped = 0, True
    (tmp_path / NAMES[0]).write_text("old")
    while stopped:
        line += 1
        stopped = interrupted(lambda: write_alone(tmp_path, "new"), line)
        assert (tmp_path / NAMES[0]).read_text() in ("old", "new")
        # Only an interrupt within the cleaning up itself leaves something, which the next removes.
    assert line > 8 and [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


@pytest.mark.parametrize("write", [write_together, write_alone])
def test_an_error_of_the_writer_leaves_what_was_there(tmp_path: Path, write: Any):
    write(tmp_path, "old")
    with pytest.raises(TypeError):
        write(tmp_path, None)
    assert "old" in found(tmp_path) and not list(tmp_path.glob(".*"))
