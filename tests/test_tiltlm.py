"""`import tiltlm`: the version, the five packages, and whether they are its own."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import tiltlm


def test_it_has_the_version_and_the_packages():
    assert tiltlm.__version__ == metadata.version("tiltlm")
    for name in tiltlm.PACKAGES:
        assert getattr(tiltlm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'sampler'; it has ppl, samplers"):
        getattr(tiltlm, "sampler")  # noqa: B009


@pytest.mark.parametrize("where", ["models/__init__.py", "models.py"])
def test_a_users_folder_in_the_way_is_named(where: str, tmp_path: Path):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("")
    root = Path(tiltlm.__file__).parent
    paths = f"sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(root)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {paths}; import tiltlm"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    expected = f"ImportError: expected models to be tiltlm's, {root / 'models' / '__init__.py'}"
    assert expected in done.stderr and f"got {tmp_path / where}; rename" in done.stderr
