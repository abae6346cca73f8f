"""Files that appear whole or not at all, alone or several together, whatever interrupts the writer.

One file takes the place of another by a rename, which is all or nothing.  Several are written into
a folder of their own, which is renamed to `READY` when all are on disk: from then on they count,
and `latest` finds them there until they have been moved to where they belong.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARTIAL, READY = ".partial-", ".ready"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` when the block has ended well."""
    path = Path(path)
    fresh = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield fresh
        _to_disk(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def together(directory: str | Path) -> Iterator[Path]:
    """A folder for files that take the places of those in `directory`, all or none, when the block
    has ended well.  One writer at a time.
    """
    directory = Path(directory)
    _settle(directory)
    for left in directory.glob(f"{PARTIAL}*/"):  # of a writer that was killed
        shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=directory))
    try:
        yield fresh
        for file in fresh.iterdir():
            _to_disk(file)
        os.rename(fresh, directory / READY)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _settle(directory)


def latest(directory: str | Path, name: str) -> Path:
    """The file of this name that was written last by `together`."""
    ready = Path(directory) / READY / name
    return ready if ready.exists() else Path(directory) / name


def _settle(directory: Path) -> None:
    """Move files that count to where they belong."""
    ready = directory / READY
    if ready.is_dir():
        for file in ready.iterdir():
            os.replace(file, directory / file.name)
        ready.rmdir()


def _to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
