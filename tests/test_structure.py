"""The shape of the source tree: who may import whom, names, sizes.  Each rule is shown to catch its
own violation.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ppl import lm, rows

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "ppl": set(),
    "samplers": {"ppl"},
    "models": {"ppl"},
    "amortized": {"ppl", "samplers", "models"},
    "experiments": {"ppl", "samplers", "models", "amortized"},
}
FRAMEWORK_FREE = {"ppl", "samplers"}
FRAMEWORKS = {"flax", "equinox"}
MAX_LINES = 400
MAX_TEST_LINES = 550
MAX_FUNCTION_LINES = 60
MAX_LOCAL_NAMES = 20
MAX_POSITIONAL = 7
MAX_WIDTH = 100
PAGES = {Path("experiments/showing/page.py"), Path("experiments/showing/view.py")}
"""HTML and JavaScript, whose lines are what they are."""
FLOORS = (
    {"ground"},
    {"strings"},
    {"draws", "mcmc", "canvas"},
    {"smc", "latent"},
    {"search"},
)
"""The families of samplers, lowest first.  A family imports itself and the floors below it."""
JAXS_OWN = (
    "jax.tree_util.register_dataclass",
    "tree_util.register_dataclass",
    "jtu.register_dataclass",
)


def dependency_names(pyproject: Path) -> set[str]:
    """Import names of everything that pyproject.toml requires, extras included."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    requirements = [
        *project["dependencies"],
        *(requirement for extra in extras for requirement in extra),
    ]
    names = {
        re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("-", "_")
        for requirement in requirements
    }
    return names - {project["name"]}


def is_script(path: Path) -> bool:
    """Notebooks are run as scripts, so they import absolutely and belong to no package."""
    return path.parts[:2] == ("experiments", "notebooks")


def import_violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports in `path` (relative to the root) that go the wrong way or have the wrong form."""
    package = path.parts[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level >= len(path.parts):
                yield (
                    f"{path}:{node.lineno}: a relative import leaves {package}; import other"
                    " packages absolutely"
                )
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for top in {module.split(".")[0] for module in modules}:
            if top == package and not is_script(path):
                yield (
                    f"{path}:{node.lineno}: imports its own package absolutely; import"
                    f" relatively inside {package}"
                )
            elif top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]:
                yield f"{path}:{node.lineno}: {package} may not import {top}"
            elif top in FRAMEWORKS and package in FRAMEWORK_FREE:
                yield f"{path}:{node.lineno}: {package} may not import {top}"
            elif top == "tests":
                yield f"{path}:{node.lineno}: {package} may not import tests"


def name_violations(path: Path, dependencies: set[str]) -> Iterator[str]:
    """Modules and folders that are named after a dependency, or after nothing."""
    for name in {*path.parts[:-1], path.stem}:
        if name.lower() in dependencies:
            yield f"{path}: '{name}' is the name of a dependency"
    if path.stem in {"utils", "util"}:
        yield f"{path}: name the module after what it does"


def size_violations(path: Path, source: str, tree: ast.Module) -> Iterator[str]:
    """What has grown too long to be read at once: modules, functions, lines, and what a head must
    hold.
    """
    most, lines = MAX_TEST_LINES if path.parts[0] == "tests" else MAX_LINES, source.count("\n")
    if lines > most:
        yield f"{path}: {lines} lines, at most {most}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{path}:{node.lineno}: {node.name}"
            yield from function_violations(place, node, path.parts[0] == "tests")
    if not is_script(path) and path not in PAGES:
        for number, line in enumerate(source.split("\n"), 1):
            # What tells a tool something may stand beyond.
            if len(re.sub(r"  # (pyright|noqa).*", "", line)) > MAX_WIDTH:
                yield f"{path}:{number}: {len(line)} characters wide, at most {MAX_WIDTH}"


def function_violations(
    place: str, node: ast.FunctionDef | ast.AsyncFunctionDef, test: bool
) -> Iterator[str]:
    """A function that is too long; of the packages also one with too many names or parameters."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if lines > MAX_FUNCTION_LINES:
        yield f"{place} has {lines} lines, at most {MAX_FUNCTION_LINES}"
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    names = {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    if len(names) > MAX_LOCAL_NAMES and not test:
        yield f"{place} has {len(names)} local names, at most {MAX_LOCAL_NAMES}"
    positional = len(node.args.posonlyargs) + len(node.args.args)
    if positional > MAX_POSITIONAL and not test:
        yield f"{place} has {positional} positional parameters, at most {MAX_POSITIONAL}"


def floor_violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports inside samplers from a floor above, or from another family on the same one."""
    if path.parts[0] != "samplers" or path.name == "__init__.py":
        return
    here = list(path.parts[1:])
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = ["samplers", *here[:-1]][: len(here) + 1 - node.level]
        for alias in node.names:
            target = [*base[1:], *(node.module or "").split("."), alias.name]
            target = [part for part in target if part]
            family = target[0] if any(target[0] in families for families in FLOORS) else "ground"
            mine = here[0] if len(here) > 1 else "ground"
            levels = {name: n for n, names in enumerate(FLOORS) for name in names}
            if family != mine and levels[family] >= levels[mine]:
                yield f"{path}:{node.lineno}: {mine} may not import {family}, no floor below"


def pytree_violations(path: Path, tree: ast.AST) -> Iterator[str]:
    """Structures that jax.jit may take for each other (`ppl/pytrees.py`)."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "register_dataclass"
            and ast.unparse(node) in JAXS_OWN
        ):
            place = f"{path}:{node.lineno}"
            yield f"{place}: register dataclasses with ppl.register_dataclass, not jax's"


def violations(root: Path) -> list[str]:
    """Every breach of the structure under `root`, as `file:line: what is wrong`."""
    dependencies = dependency_names(root / "pyproject.toml")
    found = []
    for package in [*MAY_IMPORT, "tests"]:
        for file in sorted((root / package).rglob("*.py")):
            path, source = file.relative_to(root), file.read_text()
            tree = ast.parse(source)
            found += size_violations(path, source, tree)
            if not (file.parent / "__init__.py").exists() and not is_script(path):
                found.append(f"{path.parent}: no __init__.py")
            if package != "tests":
                found += [*import_violations(path, tree), *name_violations(path, dependencies)]
                found += floor_violations(path, tree)
                found += pytree_violations(path, tree)
    return sorted(set(found))


def test_the_tree_keeps_the_rules():
    assert violations(ROOT) == []


PLANTED = {
    "ppl/a.py": ("import samplers", "ppl may not import samplers"),
    "ppl/b.py": ("def f():\n    import equinox as eqx", "ppl may not import equinox"),
    "ppl/c.py": ("from ..models import tabular", "leaves ppl"),
    "ppl/d.py": ("from ppl.lm import LM", "import relatively inside ppl"),
    "ppl/e.py": ("from tests import helpers", "may not import tests"),
    "samplers/a.py": ("from models.tabular import chain", "samplers may not import models"),
    "samplers/b.py": ("from flax import nnx", "samplers may not import flax"),
    "models/a.py": ("import samplers.smc", "models may not import samplers"),
    "models/b.py": ("import amortized", "models may not import amortized"),
    "models/ops/a.py": ("from ...ppl import lm", "leaves models"),
    "amortized/a.py": ("import experiments.decode", "amortized may not import experiments"),
    "ppl/g.py": (
        "import jax\njax.tree_util.register_dataclass(int)",
        "with ppl.register_dataclass, not jax's",
    ),
    "models/gguf.py": ("", "the name of a dependency"),
    "samplers/utils.py": ("", "name the module after what it does"),
    "ppl/long.py": ("\n" * 401, "401 lines"),
    "tests/long.py": ("\n" * 551, "551 lines"),
    "ppl/function.py": ("def f():\n" + "    pass\n" * 60, "f has 61 lines"),
    "ppl/names.py": (
        "def f():\n" + "".join(f"    a{i} = 0\n" for i in range(21)),
        "f has 21 local names",
    ),
    "ppl/many.py": ("def f(a, b, c, d, e, f, g, h):\n    pass", "f has 8 positional parameters"),
    "ppl/wide.py": ("#" * 101, "101 characters wide"),
    "samplers/smc/a.py": ("from ..search import best_of_n", "smc may not import search"),
    "samplers/mcmc/a.py": ("from ..draws import ancestral", "mcmc may not import draws"),
    "samplers/ground.py": ("from .strings import growing", "ground may not import strings"),
    "tests/deep/test_a.py": ("", "no __init__.py"),
    "experiments/bench/a.py": ("", "no __init__.py"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for folder in (*MAY_IMPORT, "tests", "models/ops", "samplers/smc", "samplers/mcmc"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "experiments" / "good.py").write_text(
        "import flax\nimport ppl, samplers\nfrom . import bench\n"
    )
    (tmp_path / "models" / "ops" / "good.py").write_text(
        "import ppl\nfrom .. import cache\nfrom flax import nnx\n"
    )
    (tmp_path / "experiments" / "notebooks").mkdir()
    (tmp_path / "experiments" / "notebooks" / "good.py").write_text("import experiments.decode\n")
    return tmp_path


def test_a_good_tree_has_no_violation(tree: Path):
    assert violations(tree) == []


@pytest.mark.parametrize("path", PLANTED)
def test_a_planted_violation_is_found(tree: Path, path: str):
    source, message = PLANTED[path]
    (tree / path).parent.mkdir(exist_ok=True)
    (tree / path).write_text(source)
    [found] = violations(tree)
    assert found.startswith(path.rpartition("/")[0]) and message in found


def test_signatures_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        rows.take_rows(jnp.zeros(3), jnp.zeros((2, 2)))


@pytest.mark.bad_input
def test_signatures_are_not_checked_where_bad_input_is_meant():
    assert rows.take_rows(jnp.zeros(3), jnp.zeros((2, 2), jnp.int32)).shape == (2, 2)


def test_constructors_are_left_to_jax():
    prefix = lm.Prefix(jnp.zeros(16, jnp.int32), jnp.int32(3), jnp.zeros(5), None)
    assert jax.eval_shape(lambda: prefix).logits.shape == (5,)


def test_two_devices_are_present():
    assert jax.device_count() >= 2 or jax.default_backend() != "cpu"
