"""What is published: the metadata agree, every import is declared, the archives hold what they
should.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from experiments.decode import __main__ as decode

from .test_structure import MAY_IMPORT, ROOT, dependency_names

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Distributions whose import name is not their own name with underscores.
IMPORT_NAME = {"pillow": "PIL", "orbax_checkpoint": "orbax"}


PEERS = [("experiments", "bench", "peers"), ("experiments", "bench", "posteriors.py")]


def undeclared_imports(root: Path) -> set[str]:
    """Top-level modules that the five packages import, and that neither Python nor pyproject.toml
    provides.

    What only the comparison with other libraries needs is declared in its own requirements.txt.
    """
    declared = {IMPORT_NAME.get(name, name) for name in dependency_names(root / "pyproject.toml")}
    known = declared | set(MAY_IMPORT) | set(sys.stdlib_module_names)
    found = set()
    for file in (file for package in MAY_IMPORT for file in (root / package).rglob("*.py")):
        if file.relative_to(root).parts[:3] in PEERS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found - known


def test_every_import_is_declared():
    assert undeclared_imports(ROOT) == set()


def test_an_undeclared_import_is_found(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "ppl").mkdir()
    (tmp_path / "ppl" / "lm.py").write_text(
        "import os\nimport jax.numpy\nimport yaml\nfrom . import target\n"
    )
    assert undeclared_imports(tmp_path) == {"yaml"}


def test_the_version_is_the_same_everywhere():
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("tiltlm") == version, (
        "run `make test` again: pyproject.toml has changed"
    )
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_that_of_the_module():
    [(name, value)] = PYPROJECT["project"]["scripts"].items()
    command = importlib.metadata.EntryPoint(name, value, "console_scripts").load()
    assert name == "tiltlm" and command is decode.main


def test_no_dependency_is_capped():
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    requirements = [
        *PYPROJECT["project"]["dependencies"],
        *(requirement for extra in extras for requirement in extra),
    ]
    assert [requirement for requirement in requirements if re.search(r"<|==|~=", requirement)] == []


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the wheel, and in the source archive without its leading folder."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (
        zipfile.ZipFile(next(out.glob("*.whl"))) as wheel,
        tarfile.open(next(out.glob("*.tar.gz"))) as source,
    ):
        return set(wheel.namelist()), {name.partition("/")[2] for name in source.getnames()}


@pytest.mark.slow
def test_the_wheel_holds_the_five_packages_and_nothing_else(archives: tuple[set[str], set[str]]):
    wheel, _ = archives
    tops = {name.split("/")[0] for name in wheel}
    about = f"tiltlm-{PYPROJECT['project']['version']}.dist-info"
    assert tops == {*MAY_IMPORT, "tiltlm.py", about}
    assert {f"{package}/py.typed" for package in MAY_IMPORT} <= wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    modules = {
        str(file.relative_to(ROOT))
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*.py")
    }
    assert modules <= wheel


@pytest.mark.slow
def test_the_source_archive_holds_the_licence_and_the_tests(archives: tuple[set[str], set[str]]):
    _, source = archives
    tests = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("*.py")}
    pages = {str(file.relative_to(ROOT)) for file in (ROOT / "docs").iterdir() if file.is_file()}
    assert {"LICENSE", "README.md", "mkdocs.yml", "pyproject.toml"} | pages | tests <= source
    assert not any(
        "__pycache__" in name or name.startswith(".") for name in source - {".gitignore"}
    )
