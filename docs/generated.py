"""What the site shows and nobody writes by hand: a hook of MkDocs (`mkdocs.yml`).

- a page for every public module of the four libraries, made of its docstrings;
- the first page, which is the README;
- `samplers.md`, the table of samplers and guarantees, from the registry;
- the notebooks: with their pictures where `make notebooks` has executed them, else their text and
  code.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "ppl": "What is inferred",
    "samplers": "How",
    "models": "Language models",
    "amortized": "How, learned",
}
FAMILIES = {
    "smc": "Sequential Monte Carlo",
    "mcmc": "Markov chains",
    "draws": "Independent draws",
    "canvas": "Canvases of any-order models",
    "latent": "Continuous latents, and models that mix text and numbers",
    "search": "Choices without a target",
}
NOTEBOOKS = ROOT / "experiments" / "notebooks"
EXECUTED = ROOT / "results" / "notebooks"
PROMISES = {
    "EXACT": "the stated law, at any number of particles, draws or moves",
    "CONSISTENT": "the stated law in the limit of a growing budget",
    "HEURISTIC": "no target: what comes back is a choice, not a weighted sample",
}


# API pages.


def public_names(package: str) -> set[str] | None:
    """The names of the package's `__all__`; None if it has none."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def homes(package: str) -> set[str]:
    """The modules that `package` takes the names of its `__all__` from."""
    names, found = public_names(package) or set(), set()
    for node in ast.walk(ast.parse((ROOT / package / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if alias.name in names:
                    found.add(f"{package}.{node.module or alias.name}")
    return found


def documented(path: Path) -> bool:
    """Whether a module has a docstring and something public in it."""
    tree = ast.parse(path.read_text())
    public = (
        not node.name.startswith("_")
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    )
    return ast.get_docstring(tree) is not None and any(public)


@functools.cache
def modules(package: str) -> list[str]:
    """Public modules: those of the package's `__all__`, or all that define something."""
    listed, found = homes(package), []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        inside = not listed or name in listed or name.rpartition(".")[0] in listed
        if inside and parts[-1] != "__main__" and name != package and documented(path):
            found.append(name)
    return found


def page_of(module: str) -> str:
    """The page of a module, from the root of the docs."""
    return f"api/{module}.md"


def page_text(module: str) -> str:
    """A module's docstring, then its samplers, then whatever else is public in it."""
    parts, names = [f"# {module}", "", f"::: {module}"], members(module)
    if names:
        parts += ["    options:", "      members: false", ""]
    for name in names:
        parts += [f"::: {module}.{name}", "    options:"]
        parts += ["      show_root_heading: true", "      show_root_toc_entry: true", ""]
    return "\n".join([*parts, ""])


def source(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def members(module: str) -> list[str]:
    """What a module that has samplers says something about, these first; of others nothing."""
    ours, rest = [], []
    body = ast.parse(source(module).read_text()).body
    for node, after in itertools.zip_longest(body, body[1:]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            samples = any(map(registers, node.decorator_list))
            (ours if samples else rest).append(node.name if ast.get_docstring(node) else "_")
        elif isinstance(node, ast.Assign) and isinstance(after, ast.Expr):
            rest.append(ast.unparse(node.targets[0]))
    return [*ours, *(name for name in rest if not name.startswith("_"))] if ours else []


def registers(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "sampler"


def overview(package: str) -> str:
    """The page of a package: its docstring, and its modules with their first sentences."""
    doc = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
    rows = [f"| [`{name}`]({name}.md) | {sentence(name)} |" for name in modules(package)]
    return "\n".join([f"# {package}\n\n{doc}\n", "| module | |", "| --- | --- |", *rows, ""])


def sentence(module: str) -> str:
    """The first paragraph of a module's docstring."""
    return first(ast.get_docstring(ast.parse(source(module).read_text())) or "")


def first(doc: str) -> str:
    return escape(" ".join(doc.split("\n\n")[0].split()))


def escape(text: str) -> str:
    """Text for a cell of a table."""
    return re.sub(r"<(?=\S)", "&lt;", text).replace("|", "\\|")


# The table of samplers.


def registered() -> list[Any]:
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("samplers.registry").entries()


def sampler_table(entries: list[Any]) -> str:
    """Every public sampler with what it does, what it guarantees, and the test that proves it."""
    lines = ["# Samplers", "", "Every public sampler, from the registry (`python -m"]
    lines[-1] += " samplers.registry` prints the same). The tests prove each guarantee:"
    lines += ["", *(f"- **{name}**: {text}." for name, text in PROMISES.items())]
    for family, title in FAMILIES.items():
        lines += ["", f"## {title}", "", "| sampler | guarantee | what it does, and its proof |"]
        lines.append("| --- | --- | --- |")
        for entry in entries:
            module, _, function = entry.name.rpartition(".")
            if module.split(".")[1] == family:
                link = f"[`{module.split('.')[-1]}.{function}`]({page_of(module)}#{entry.name})"
                what = escape(entry.purpose).rstrip(".:")
                proof = entry.proof.removeprefix("tests/")
                lines.append(f"| {link} | {entry.guarantee.name} | {what}; `{proof}` |")
    return "\n".join([*lines, ""])


# Notebooks.


def notebook(source: Path, executed: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by name."""
    import jupytext
    import nbformat
    from nbconvert import MarkdownExporter

    cells = nbformat.read(executed, 4) if executed.exists() else jupytext.read(source)
    cells.metadata["language_info"] = {"name": "python"}
    exporter = MarkdownExporter()
    text, extra = exporter.from_notebook_node(
        cells, {"unique_key": source.stem, "output_files_dir": f"{source.stem}_files"}
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if not executed.exists():
        note = "Shown without its pictures: `make notebooks`, then `make docs`, puts them here."
        head, _, rest = text.lstrip().partition("\n")
        text = f'{head}\n\n!!! note ""\n    {note}\n{rest}'
    return text, extra.get("outputs") or {}


def notebooks() -> dict[str, str | bytes]:
    """The pages of all notebooks, and their pictures."""
    pages: dict[str, str | bytes] = {}
    for source in sorted(NOTEBOOKS.glob("*.py")):
        text, pictures = notebook(source, EXECUTED / f"{source.stem}.ipynb")
        pages[f"notebooks/{source.stem}.md"] = text
        pages |= {f"notebooks/{name}": picture for name, picture in pictures.items()}
    return pages


# What MkDocs calls.


def home() -> str:
    """The README, which is the first page."""
    return (ROOT / "README.md").read_text().replace("](docs/", "](")


def api() -> dict[str, str]:
    """All API pages."""
    pages = {page_of(name): page_text(name) for p in PACKAGES for name in modules(p)}
    return pages | {page_of(package): overview(package) for package in PACKAGES}


def on_config(config: Any) -> Any:
    """Puts the generated pages into the navigation."""
    stems = [path.stem for path in sorted(NOTEBOOKS.glob("*.py"))]
    config.nav.append({"Notebooks": [f"notebooks/{stem}.md" for stem in stems]})
    tree = [{package: [page_of(package), *branches(package)]} for package in PACKAGES]
    config.nav.append({"API": tree})
    return config


def branches(package: str) -> list[dict[str, Any]]:
    """The pages of a package, those of its families in a branch for each."""
    found: dict[str, Any] = {}
    for name in modules(package):
        *family, last = name.split(".")[1:]
        inside = found.setdefault(f"{family[0]}/", {}) if family else found
        inside[last] = page_of(name)
    return [
        {name.rstrip("/"): [{n: p} for n, p in page.items()] if name.endswith("/") else page}
        for name, page in found.items()
    ]


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    pages = {
        "index.md": home(),
        "samplers.md": sampler_table(registered()),
        **api(),
        **notebooks(),
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        tag, opening, formula = found.groups()
        plain = formula.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(plain, display="block" if opening == "[" else "inline")

    pattern = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'
    return re.sub(pattern, drawn, html, flags=re.DOTALL)
