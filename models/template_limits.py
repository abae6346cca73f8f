"""A jinja2 sandbox in which a template cannot run on: templates come with models, and are programs.

jinja2's own sandbox keeps a template from what it must not reach, not from what it must not use up.
Here turns of loops, calls, filters and operators are steps: they are counted, and with each the
processor time of the thread is looked at.  Characters are counted as texts are made.  What builds a
text in one go is weighed before: a filter, method or operator by which a text can grow is refused
if the sizes of all that goes in, multiplied, are beyond the bound, where a width is as large as it
says.  So time and memory are limited on every platform, within this process.

What cannot be limited is what objects do that a caller hands in as variables.
"""

from __future__ import annotations

import contextvars
import functools
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

MOST_STEPS = 300_000
SECONDS = 1.0
MOST_CHARACTERS = 50_000_000
"""Of all texts that are made, the rendered one among them."""
LONGEST_SOURCE = 100_000
LARGEST_NUMBER = 100_000
"""Bits of a product or power."""

_WIDTHS = {"center", "indent", "batch", "slice", "tojson", "wordwrap", "truncate"}
_WIDTHS |= {"ljust", "rjust", "zfill", "expandtabs"}
"""Filters and methods of texts whose numbers are widths."""
_FORMATS = {"format", "format_map"}
_GROWING = _WIDTHS | _FORMATS | {"replace", "join", "translate", "urlize", "xmlattr"}
"""Filters and methods whose result may be as large as all that goes in, multiplied."""
_FIGURES = re.compile(r"\d+")


class Exceeded(jinja2.TemplateError):
    """A template that takes too long or writes too much."""


class Budget:
    """What a rendering has left."""

    def __init__(self) -> None:
        self.steps, self.characters = MOST_STEPS, MOST_CHARACTERS
        self.end = time.thread_time() + SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Exceeded(f"more than {MOST_STEPS} loop turns, calls and operations")
        if time.thread_time() > self.end:
            raise Exceeded(f"more than {SECONDS:g} seconds of processor time")

    def made(self, value: Any) -> Any:
        """`value`, whose characters or entries are taken off."""
        if isinstance(value, str | bytes | list | tuple):
            self.characters -= len(value)
            if self.characters < 0:
                raise Exceeded(f"texts of more than {MOST_CHARACTERS} characters")
        return value


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def weight(value: Any, widths: bool = False, seen: dict[int, int] | None = None) -> int:
    """How many characters a value has when it is written; with `widths`, numbers count as what they
    say.
    """
    if isinstance(value, str | bytes):
        figures = _FIGURES.findall(str(value)) if widths else ()
        return max([len(value), *(int(number[:12]) for number in figures)])
    if isinstance(value, int):
        return abs(value) if widths else value.bit_length()
    if isinstance(value, jinja2.utils.Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if not isinstance(value, Collection):
        return 30
    # What a list holds twice is written twice, but looked at once.
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = 3  # what holds itself is written as ...
        items = [x for pair in value.items() for x in pair] if isinstance(value, Mapping) else value
        seen[id(value)] = 2 + sum(2 + weight(item, widths, seen) for item in items)
    return seen[id(value)]


def _check(name: str, *values: Any) -> None:
    """Refuse an operation whose result might be too large."""
    first, *rest = values
    if name in _FORMATS:
        # A width may be a number in the text, or be given beside it: %*d, {:{}}.
        beside = "*" in str(first) or bool(re.search(r":[^}]*\{", str(first)))
        sizes = [weight(first, True), *(weight(value, beside) for value in rest)]
    else:
        sizes = [weight(first), *(weight(value, name in _WIDTHS) for value in rest)]
    if (
        math.prod(1 + size for size in sizes) if name in _GROWING else sum(sizes)
    ) > MOST_CHARACTERS:
        raise Exceeded(f"an operation whose result may have over {MOST_CHARACTERS} characters")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits = left.bit_length()
    most = {"*": bits + right.bit_length(), "**": bits * abs(right)}.get(operator, 0)
    if most > LARGEST_NUMBER:
        raise Exceeded(f"a number of more than {LARGEST_NUMBER} bits")


def _listed(value: Any) -> Any:
    """What is consumed in one go, as a list: its size is then known."""
    return list(_counted(value)) if isinstance(value, Iterator) else value


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each a step."""
    budget = _budget.get()
    for item in items:
        budget.step()
        yield item


def _joined(*parts: Any) -> str:
    """What `~` makes of its operands."""
    _check("~", *parts)
    return _budget.get().made("".join(map(str, parts)))


def _concatenated(parts: Iterable[str]) -> str:
    """What a macro or a block has written."""
    parts = list(parts)
    for part in parts:
        _budget.get().made(part)
    return "".join(parts)


def limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are weighed before it is called."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        budget = _budget.get()
        budget.step()
        args = tuple(map(_listed, args))
        inner = (jinja2.Environment, jinja2.runtime.Context, jinja2.nodes.EvalContext)
        own = [value for value in args if not isinstance(value, inner)]
        _check(name, *own, *options.values())
        return budget.made(function(*args, **options))

    return call


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; its templates are run by `generate`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_concatenated)

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(finalize=self._final, **options)
        own = {name: limited(name, run) for name, run in {**self.filters, **filters}.items()}
        self.filters = own | {"_counted": _counted, "_joined": _joined}
        del self.globals["lipsum"]

    @staticmethod
    def _final(value: Any) -> Any:
        if not isinstance(value, str):
            _check("written", value)
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        if len(source) > LONGEST_SOURCE:
            raise Exceeded(f"a source of more than {LONGEST_SOURCE} characters")
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = self._filter(loop.iter, "_counted")
        return _Concatenations(self).visit(tree)

    def _filter(self, first: Any, name: str, *rest: Any) -> jinja2.nodes.Filter:
        made = jinja2.nodes.Filter(first, name, list(rest), [], None, None, lineno=first.lineno)
        made.set_environment(self)
        return made

    def call(self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        budget = _budget.get()
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes):
            args = tuple(map(_listed, args))
            _check(getattr(method, "__name__", ""), owner, *args, *options.values())
        return budget.made(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if operator == "%" and isinstance(left, str | bytes):
            _check("format", left, right)
        elif isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            _check("center", text, times)
        elif operator == "+":
            _check("+", left, right)
        return budget.made(super().call_binop(context, operator, left, right))


class _Concatenations(jinja2.visitor.NodeTransformer):
    """Puts filters in the place of `~`, which is no operator to jinja2."""

    def __init__(self, environment: LimitedEnvironment) -> None:
        self.environment = environment

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return self.environment._filter(first, "_joined", *rest)


def generate(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        Exceeded: if it takes more than `MOST_STEPS`, `SECONDS` or `MOST_CHARACTERS`.
    """
    budget = Budget()
    token = _budget.set(budget)
    try:
        return "".join(map(budget.made, template.generate(variables)))
    finally:
        _budget.reset(token)
