"""Fixtures of the experiments' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import compilation

from . import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny chat model."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def _compiled_where_the_session_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands choose a compilation cache for the whole process; in tests the session's own stays."""
    monkeypatch.setattr(compilation, "use_cache", lambda: None)
