"""Reprs: short whatever an object holds, right about what it is, and harmless wherever they are
called.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppl
from models import tabular
from ppl import showing
from ppl.sequences import Sequences


class Kind(enum.Enum):
    ONE = 1


@ppl.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    y: Any = None
    name: str = dataclasses.field(default="a", metadata={"static": True})


@showing.shown
class Pair(NamedTuple):
    left: Any
    right: Any


@ppl.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    x: Any

    def __repr__(self) -> str:
        return "mine"


@ppl.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken:
    x: Any

    def _shown_(self) -> dict[str, Any]:
        raise RuntimeError("no")


class Odd:
    """An object of another library, whose repr is never asked for."""

    shape = dtype = None

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.arange(6).reshape(2, 3), "int64[2, 3] (0 to 5, mean 2.5)"),
        (jnp.float32(-1.23456), "-1.235"),
        (
            jnp.array([1.0, -jnp.inf, 3.0, jnp.nan], jnp.float32),
            "float32[4] (1 to 3, mean 2, 1 at nan, 1 at -inf)",
        ),
        (jnp.full(3, -jnp.inf, jnp.float32), "float32[3] (3 at -inf)"),
        (jnp.full((2, 2), 7, jnp.int32), "int32[2, 2] (7)"),
        (jnp.array([True, False, True]), "bool[3] (2 of 3 true)"),
        (jnp.bool_(True), "True"),
        (jnp.bfloat16([1.0, 2.0]), "bfloat16[2] (1 to 2, mean 1.5)"),
        (jnp.zeros((0, 4), jnp.float32), "float32[0, 4]"),
        (jnp.zeros((300, 300), jnp.float32), "float32[300, 300]"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "float32[3]"),
        (jax.random.key(0), "key<fry>[]"),
        (np.array(["a"]), "<U1[1]"),
        (1.0, "1"),
        ("it's", '"it\'s"'),
        (Kind.ONE, "Kind.ONE"),
        (Odd(), "Odd"),
        (Kind, "Kind"),
        (len, "len"),
        (functools.partial(max, 1), "partial(max)"),
        ({"a": [1, (2, None)]}, "{a: [1, (2, None)]}"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ... 3 more]"),
        (
            Pair(jnp.zeros(2, jnp.float32), Record(1)),
            "Pair(left=float32[2] (0), right=Record(x=1, y=None, name='a'))",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_summary_says(x: Any, expected: str):
    assert showing.text(x) == expected


def test_long_records_have_a_line_for_each_field():
    lines = repr(
        Record(
            jnp.arange(50.0, dtype=jnp.float32),
            Record(jnp.arange(60.0, dtype=jnp.float32), jnp.arange(70.0, dtype=jnp.float32)),
        )
    ).split("\n")
    assert lines[0] == "Record(" and lines[-1] == ")" and len(lines) == 5
    assert lines[1] == "    x=float32[50] (0 to 49, mean 24.5),"


HUGE = [
    Record("a" * 100_000, name="b" * 100_000),
    Record([[[["a" * 90] * 9] * 9] * 9] * 9, {str(i) * 50: [i] * 50 for i in range(100)}),
    Record(
        {i: Record(Record([Record(jnp.arange(40.0, dtype=jnp.float32))] * 50)) for i in range(50)}
    ),
    Record(10**4000, b"x" * 10**6),
    functools.reduce(lambda inner, _: Record(inner, inner), range(20), Record(1)),
    Pair(np.zeros((100, 100)), [np.arange(10.0)] * 1000),
    dataclasses.make_dataclass("Wide", [f"field_{i}" for i in range(200)])(*range(200)),
]


@pytest.mark.parametrize("x", HUGE, ids=range(len(HUGE)))
def test_whatever_it_holds_it_is_short(x: Any):
    for found in (showing.text(x), showing.text([x] * 9), showing.text({"a": x})):
        assert 0 < len(found) < 2000 and found.count("\n") < 30
    assert len(showing.page(x)) < 20_000


def test_a_class_keeps_its_own_repr_and_a_broken_summary_shows_the_fields():
    assert repr(Own(jnp.zeros(9, jnp.float32))) == "mine"
    assert repr(Broken(3)) == "Broken(x=3)"
    half = object.__new__(Record)
    assert repr(half) == "Record(x=..., y=None, name='a')" and "..." in half._repr_html_()  # pyright: ignore


def test_what_is_deleted_or_traced_has_a_shape():
    x = jnp.arange(3.0, dtype=jnp.float32)
    x.delete()
    assert repr(Record(x)) == "Record(x=float32[3], y=None, name='a')"
    said = []
    jax.jit(lambda record: said.append(repr(record)) or record.x)(
        Record(jnp.zeros((2, 3), jnp.float32))
    )
    jax.vmap(lambda record: said.append(repr(record)) or record.x)(
        Record(jnp.zeros((2, 3), jnp.float32))
    )
    jax.grad(lambda x: said.append(repr(Record(x))) or x.sum())(jnp.zeros(4, jnp.float32))
    shapes = [f"Record(x=float32[{shape}], y=None, name='a')" for shape in ("2, 3", "3", "4")]
    assert said == shapes


def test_pages_are_tables_without_scripts():
    page = Record("<script>alert(1)</script>", jnp.arange(3, dtype=jnp.int32))._repr_html_()  # pyright: ignore
    assert "<script" not in page and "&lt;script&gt;" in page and "color" not in page
    assert page.startswith("<table") and "int32[3] (0 to 2, mean 1)" in page


def test_targets_models_and_strings():
    lm = tabular.markov([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4], [0.1, 0.1, 0.8]], eos=2)
    assert repr(lm) == (
        "LM(architecture=tabular.markov, vocab_size=3, eos=2, context=None, parameters=9 float32)"
    )
    target = lm.given([0, 1], max_tokens=5) ** 4 * ppl.banned([1])
    said = repr(target)
    for part in ("model=LM(", "prompt_length=2", "max_tokens=5", "alpha=4", "potentials=[Banned]"):
        assert part in said
    assert repr(target.prefix).startswith("Prefix(length=2, padded=16, logits=float32[3]")
    strings = Sequences(jnp.array([[0, 1, 2], [1, 1, 1]], jnp.int32), jnp.array([2, 3], jnp.int32))
    assert repr(strings) == (
        "Sequences(N=2, T=3, length=int32[2] (2 to 3, mean 2.5), first=[0 1, 1 1 1])"
    )
    batch = jax.tree.map(lambda leaf: leaf[None], strings)
    assert repr(batch).startswith("Sequences(batch=(1), N=2, T=3, length=int32[1, 2]")
    nothing = jax.tree.map(lambda leaf: object(), target)
    assert 0 < len(repr(nothing)) < 2000 and "potentials=[Banned]" in repr(nothing)
    shapes = jax.eval_shape(lambda: target)
    assert "prompt_length=int32[]" in repr(shapes)


def repr_violations(module: ModuleType) -> Iterator[str]:
    """Public records whose repr is what Python makes of all their fields, at any length."""
    generated = {"<string>", collections.namedtuple.__code__.co_filename}
    for name, kind in vars(module).items():
        own = inspect.isclass(kind) and kind.__module__ == module.__name__
        if own and not name.startswith("_"):
            code = getattr(inspect.unwrap(kind.__repr__), "__code__", None)
            if code is not None and code.co_filename in generated:
                yield f"{module.__name__}.{name}: its repr may be of any length; use showing.shown"


def test_every_public_record_has_a_short_repr():
    found = []
    for package in ("ppl", "samplers", "models", "amortized"):
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, f"{package}."):
            if not module.name.endswith("__main__"):
                found += repr_violations(importlib.import_module(module.name))
    assert found == []


def test_a_long_repr_is_found():
    module = ModuleType("planted")
    source = (
        "import dataclasses, typing\n"
        "class Pair(typing.NamedTuple):\n    left: int\n"
        "@dataclasses.dataclass\nclass Record:\n    x: int\n"
        "class Own(typing.NamedTuple):\n    x: int\n    __repr__ = lambda self: 'own'\n"
    )
    exec(compile(source, "planted.py", "exec", dont_inherit=True), vars(module))
    assert [line.split(":")[0] for line in repr_violations(module)] == [
        "planted.Pair",
        "planted.Record",
    ]
