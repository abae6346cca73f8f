"""Mutants made from the syntax tree: every place where an operator applies, in the order of the
text.

A mutation says something else of the mathematics: a term is dropped, a sign turned, a comparison
shifted by one or turned round, a guard left out, a key or an option another one.  What only a
reader sees (messages, annotations, docstrings, default values, dtypes) is left alone.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from .mutant import ROOT, Mutant

Change = tuple[str, str]
"""What was done, in words, and the text that stands there now."""

COUNTS = frozenset(
    "length lengths horizon longest size sizes num count position positions rounds round left cut"
    " tokens max_tokens passed tests token steps t k r shape arange".split()
)
"""Names of whole numbers: a comparison of them is worth shifting by one."""
SHIFTED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
OTHERS = {
    "minimum": "maximum",
    "maximum": "minimum",
    "argmax": "argmin",
    "argmin": "argmax",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "cummax": "cummin",
    "log_softmax": "softmax",
    "isneginf": "isposinf",
    "floor": "ceil",
}
CHOICES = frozenset({"where", "where_rows"})
"""Functions (condition, one, other)."""
QUIET_KEYWORDS = frozenset(
    "dtype static_argnums static_argnames donate_argnums metadata default default_factory proof"
    " stacklevel strict frozen eq kw_only total".split()
)
QUIET_FUNCTIONS = frozenset({"__repr__", "__str__", "_shown_"})
QUIET_CALLS = frozenset({"TypeVar", "field", "ValueError", "TypeError", "register_dataclass"})


@functools.cache
def mutants_of(file: str, root: Path = ROOT) -> list[Mutant]:
    """All mutants of a file."""
    text = (root / file).read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()

    def offset(line: int, column: int) -> int:
        return len(raw[: starts[line - 1] + column].decode())

    found = []
    for place, scope, node in _places(ast.parse(text)):
        begin = offset(node.lineno, node.col_offset)
        end = offset(node.end_lineno or 0, node.end_col_offset or 0)
        for what, new in _changes(node, scope):
            found.append(Mutant(file, what, place, begin, text[begin:end], new))
    return found


def _places(tree: ast.Module) -> Iterator[tuple[str, frozenset[str], ast.expr | ast.stmt]]:
    """(name of the function, the keys that it has, node) of all that may be mutated."""

    def visit(
        node: ast.AST, names: tuple[str, ...], keys: frozenset[str]
    ) -> Iterator[tuple[str, frozenset[str], ast.expr | ast.stmt]]:
        if isinstance(node, ast.FunctionDef):
            if node.name in QUIET_FUNCTIONS:
                return
            names, keys = (*names, node.name), keys | _keys(node)
            children: list[ast.AST] = list(node.body)
        elif isinstance(node, ast.ClassDef):
            names, children = (*names, node.name), list(node.body)
        elif isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
            return
        elif isinstance(node, ast.AnnAssign):
            children = [] if node.value is None else [node.value]
        elif isinstance(node, ast.Lambda):
            children = [node.body]
        elif isinstance(node, ast.Call) and _called(node) in QUIET_CALLS:
            return
        elif isinstance(node, ast.keyword) and node.arg in QUIET_KEYWORDS:
            return
        else:
            children = list(ast.iter_child_nodes(node))
        if names and isinstance(node, ast.expr | ast.stmt):
            yield ".".join(names), keys, node
        for child in children:
            yield from visit(child, names, keys)

    yield from visit(tree, (), frozenset())


def _keys(node: ast.FunctionDef) -> frozenset[str]:
    """Names of single keys that a function takes or makes."""
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    named = {arg.arg for arg in [*node.args.args, *node.args.kwonlyargs]}
    return frozenset(name for name in stored | named if name == "key" or name.endswith("_key"))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


def _changes(node: ast.AST, keys: frozenset[str]) -> Iterator[Change]:
    for kind, change in RULES:
        if isinstance(node, kind):
            yield from change(node, keys)


def _compared(node: ast.Compare, keys: frozenset[str]) -> Iterator[Change]:
    if len(node.ops) > 1:
        return
    sides = (node.left, node.comparators[0])
    for n, other in enumerate(SHIFTED.get(type(node.ops[0]), ())):
        if n == 0 and len(SHIFTED[type(node.ops[0])]) == 2 and not any(map(_counts, sides)):
            continue  # of real numbers, as good as never equal
        what = "turned round" if n or len(SHIFTED[type(node.ops[0])]) == 1 else "off by one"
        yield what, _text(ast.Compare(node.left, [other()], node.comparators))


def _counts(node: ast.AST) -> bool:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return bool({part for name in names for part in (name, *name.split("_"))} & COUNTS)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    text |= isinstance(node, ast.Call) and _called(node) == "join"
    return text or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.Dict)


def _calculated(node: ast.BinOp, keys: frozenset[str]) -> Iterator[Change]:
    if _is_text(node):
        return
    left, right = _text(node.left), _text(node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield "sign turned", _text(ast.BinOp(node.left, other, node.right))
        yield "term dropped", left
    elif isinstance(node.op, ast.Mult | ast.Div | ast.Pow):
        yield "factor dropped", left
    elif isinstance(node.op, ast.BitAnd | ast.BitOr):
        other = ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd()
        yield "and/or", _text(ast.BinOp(node.left, other, node.right))
        yield "condition dropped", left
        yield "condition dropped", right


def _both(node: ast.BoolOp, keys: frozenset[str]) -> Iterator[Change]:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "and/or", _text(ast.BoolOp(other, node.values))


def _negated(node: ast.UnaryOp, keys: frozenset[str]) -> Iterator[Change]:
    if isinstance(node.op, ast.Invert | ast.Not | ast.USub):
        if not isinstance(node.operand, ast.Constant):
            yield "negation dropped", _text(node.operand)


def _called_with(node: ast.Call, keys: frozenset[str]) -> Iterator[Change]:
    name, args = _called(node), node.args
    if name in CHOICES and len(args) == 3:
        swapped = ast.Call(node.func, [args[0], args[2], args[1]], node.keywords)
        yield "branches swapped", _text(swapped)
        yield "choice dropped", _text(args[1])
        yield "choice dropped", _text(args[2])
    if name in OTHERS:
        function = (
            ast.Attribute(node.func.value, OTHERS[name])
            if isinstance(node.func, ast.Attribute)
            else ast.Name(OTHERS[name])
        )
        yield f"{OTHERS[name]} for {name}", _text(ast.Call(function, args, node.keywords))
    for n, keyword in enumerate(node.keywords):
        if keyword.arg is None or keyword.arg in QUIET_KEYWORDS or not args:
            continue
        rest = [*node.keywords[:n], *node.keywords[n + 1 :]]
        yield f"{keyword.arg} left out", _text(ast.Call(node.func, args, rest))


def _number(node: ast.Constant, keys: frozenset[str]) -> Iterator[Change]:
    if type(node.value) is int:
        yield "off by one", f"({node.value + 1})"


def _key(node: ast.Name, keys: frozenset[str]) -> Iterator[Change]:
    if node.id in keys and isinstance(node.ctx, ast.Load):
        for other in sorted(keys - {node.id})[:1]:
            yield "wrong key", other


def _assigned(node: ast.Assign, keys: frozenset[str]) -> Iterator[Change]:
    """A step left out: x = f(x)."""
    [target, *more] = node.targets
    if more or not isinstance(target, ast.Name):
        return
    if any(isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(node.value)):
        yield "step left out", "pass"


def _added(node: ast.AugAssign, keys: frozenset[str]) -> Iterator[Change]:
    yield "step left out", "pass"


RULES: tuple[tuple[type, Callable[..., Iterator[Change]]], ...] = (
    (ast.Compare, _compared),
    (ast.BinOp, _calculated),
    (ast.BoolOp, _both),
    (ast.UnaryOp, _negated),
    (ast.Call, _called_with),
    (ast.Constant, _number),
    (ast.Name, _key),
    (ast.Assign, _assigned),
    (ast.AugAssign, _added),
)
