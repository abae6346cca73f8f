"""Which test files belong to a module: its mirror first, then those that import it, then those of
the modules that do.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from .mutant import PACKAGES, ROOT

MOST = 10
"""Test files of one module."""
CHANGE_DETECTORS = frozenset({"tests/samplers/test_bits.py"})
"""Tests that know the draws of old and nothing of what is right: catching is not their merit."""


@functools.cache
def tests_of(file: str, root: Path = ROOT) -> tuple[str, ...]:
    """Test files of a module `file`, those that know it best first."""
    module, mirrored = _module(file), _mirror(file)
    imports = _imports_of_tests(root)
    users = {test for test, modules in imports.items() if module in modules}
    inner = {
        _mirror(str(path.relative_to(root)))
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        if module in _imports(path, root)
    }
    package = _mirror(str(Path(file).parent.with_suffix(".py")))
    own = {test for test in imports if test.startswith(mirrored.removesuffix(".py"))}
    own |= imports.keys() & {package}
    folder = str(Path(mirrored).parent)

    def distance(test: str) -> tuple[bool, bool, bool, int, str]:
        direct = test in users
        breadth = len(imports[test])
        return test not in own, not direct, str(Path(test).parent) != folder, breadth, test

    found = (own | users | (inner & imports.keys())) - CHANGE_DETECTORS
    return tuple(sorted(found, key=distance)[:MOST])


def _mirror(file: str) -> str:
    path = Path(file)
    return str(Path("tests") / path.parent / f"test_{path.name}")


def _module(file: str) -> str:
    return ".".join(Path(file).with_suffix("").parts)


@functools.cache
def _imports_of_tests(root: Path) -> dict[str, frozenset[str]]:
    folders = (*PACKAGES, "models")
    files = (path for folder in folders for path in (root / "tests" / folder).rglob("test_*.py"))
    return {str(path.relative_to(root)): _imports(path, root) for path in files}


@functools.cache
def _imports(path: Path, root: Path) -> frozenset[str]:
    """Modules whose names a file uses; a name that a package hands on is its module's."""
    here, found = path.relative_to(root).parent.parts, set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) + 1 - node.level]) if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {_origin(origin, alias.name, root) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in {"ppl", "smc"}:
                package = "ppl" if node.value.id == "ppl" else "samplers.smc"
                found.add(_origin(package, node.attr, root))
    return frozenset(found)


def _origin(package: str, name: str, root: Path) -> str:
    """The module that `from package import name` gives, or takes the name from."""
    folder = root / Path(*package.split("."))
    if (folder / f"{name}.py").exists() or (folder / name).is_dir():
        return f"{package}.{name}"
    if (folder / "__init__.py").exists() and path_is_ours(package):
        return _handed_on(folder / "__init__.py", package).get(name, package)
    return package


def path_is_ours(package: str) -> bool:
    return package.split(".")[0] in PACKAGES


@functools.cache
def _handed_on(init: Path, package: str) -> dict[str, str]:
    tree = ast.parse(init.read_text())
    return {
        alias.asname or alias.name: f"{package}.{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for alias in node.names
    }
