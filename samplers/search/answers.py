r"""What a text answers, and which answers are equal; on the host, once for every string.

    pool = pools.draw(key, p, num=256, answer=answers.boxed(tok))

An answer function takes the token ids of a string, or its text if it has a tokenizer, and gives
anything hashable, equal for equal answers, or None.  Where equality is a function and not a hash,
as in a verifier of mathematics, give it as `equal`:

    answers.function(tok, lambda text: math_verify.parse(text) or None, equal=math_verify.verify)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from ppl.checks import check_function
from ppl.showing import inline, shown

MOST_DIGITS = 1000
"""Longer numbers are no answers but loops of a model; Python refuses to read them too."""

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-+])?(?:{_PLAIN})(?:[eE][-+]?\d{{1,3}}(?!\d))?")
_RATIO = re.compile(rf"({_NUMBER.pattern})(?:\s*/\s*(\d+)(?!\d|\.\d))?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?")
_SPACES = re.compile(r"\\[!,;: ]|\s+|\\left|\\right|~")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")


@shown
@dataclasses.dataclass(frozen=True)
class Answer:
    """What a text answers: `read` of it, and which readings are `equal`; None: those that hash
    alike.
    """

    tokenizer: Any
    read: Callable[[str], Any]
    equal: Callable[[Any, Any], bool] | None = None

    def __call__(self, ids: list[int]) -> Any:
        """The answer of one string, from its token ids."""
        return self.read(self.tokenizer.decode(ids))


def function(
    tokenizer: Any,
    read: Callable[[str], Any],
    *,
    equal: Callable[[Any, Any], bool] | None = None,
) -> Answer:
    """Any function of the text as an answer function.

    Args:
        tokenizer: anything with decode(ids) -> str.
        read: text -> answer, hashable unless `equal` is given; None is no answer.
        equal: (answer, answer) -> bool, asked of each new answer and the first of each class.

    Raises:
        ValueError: if they are no functions.
    """
    check_function("read", read, "(text)", "samplers.search.answers.number")
    if equal is not None:
        check_function("equal", equal, "(one, other)", "operator.eq")
    return Answer(tokenizer, read, equal)


def last_number(tokenizer: Any) -> Answer:
    """The last number of the text: 1,000 = 1000 = 1000.0, and 1/2 = 0.5."""
    return Answer(tokenizer, number)


def boxed(tokenizer: Any) -> Answer:
    r"""What the last \boxed{...} holds: a number where it is one, else its text without spaces."""
    return Answer(tokenizer, box)


def choice_letter(tokenizer: Any, letters: str = "ABCD") -> Answer:
    """The letter of a multiple choice: after the last "answer is", in the last box, or the last
    that stands by itself as in "(B)", "B." or at the end.

    Raises:
        ValueError: without letters.
    """
    if not letters or not letters.isalpha():
        raise ValueError(f"expected letters to choose from, got {letters!r}; pass 'ABCD'")
    return Answer(tokenizer, _Letter(letters))


def number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none.

    Commas may part thousands, a point decimals; an exponent has three digits at most; a / b of
    whole numbers is a fraction.
    """
    every = list(_RATIO.finditer(text.replace("\u2212", "-")))  # the sign of typesetters
    if not every or len(every[-1][0]) > MOST_DIGITS:
        return None
    found = every[-1]
    top, below = Fraction(found[1].replace(",", "")), int(found[2] or 1)
    return top / below if below else None


def box(text: str) -> Hashable:
    r"""What the last \boxed{...} or \fbox{...} of a text holds; None if there is none, or it never
    closes.
    """
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return _normal(text[begin:end])
    return None


def _normal(content: str) -> Hashable:
    """A number where the whole is one, else the text in one spelling; None if it is empty."""
    bare = _SPACES.sub("", _WORDS.sub(r"\1", content)).strip("$").rstrip(".")
    bare = bare.replace("{,}", ",").replace("\\$", "").replace("\\%", "").replace("%", "")
    ratio = _FRACTION.fullmatch(bare)
    plain = f"{ratio[1]}{ratio[2]}/{ratio[3]}" if ratio else bare.replace("\u2212", "-")
    whole = _RATIO.fullmatch(plain)
    value = number(plain) if whole else None
    return (bare or None) if value is None else value


@dataclasses.dataclass(frozen=True)
class _Letter:
    """The chosen letter of a text."""

    letters: str

    def __call__(self, text: str) -> str | None:
        one = rf"([{self.letters}])"
        said = re.findall(
            rf"(?i:answer)(?:\s+(?i:is)\s*:?|\s*:)[\s(\[*\"'$]*{one}(?![A-Za-z'])", text
        )
        held = box(text)
        if said:
            return said[-1]
        if isinstance(held, str) and held.strip("()") in tuple(self.letters):
            return held.strip("()")
        alone = re.findall(rf"\({one}\)|(?<![A-Za-z]){one}(?=[.):\]*]|\s*$)", text)
        return next((a or b for a, b in reversed(alone)), None)


def ids_of(
    strings: Sequence[Any], answer: Callable[[Any], Any]
) -> tuple[Int[np.ndarray, " N"], list[str]]:
    """Ids [N] int32 of what strings answer, in the order in which the answers first come, -1 for
    none; and, in words, each failure of the answer function or of its `equal`.

    Args:
        strings: N of what `answer` takes.
        answer: to anything hashable, or with an attribute `equal` to anything at all; None and NaN
            are no answers.  Where it or `equal` raises, the string has none.  `equal` is asked
            (first, new) of the first member of one class after another.

    Raises:
        ValueError: for an answer that cannot be hashed, if there is no `equal`.
    """
    known: dict[Hashable, int] = {}
    firsts: list[Any] = []
    failures: list[str] = []
    ids = np.full(len(strings), -1, np.int32)
    for i, string in enumerate(strings):
        try:
            value = answer(string)
            which = -1 if _is_none(value) else _class_of(value, answer, known, firsts)
        except _Unhashable:
            raise
        except Exception as raised:  # One bad string must not cost the others.
            failures.append(f"{type(raised).__name__}: {raised} on {_said(string, answer)}")
            continue
        if which == len(firsts):
            firsts.append(value)
        if which >= 0 and _hashes(value):
            known[value] = which
        ids[i] = which
    return ids, failures


def _is_none(value: Any) -> bool:
    """No answer; NaN is none either, and would be equal to nothing, itself included."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


class _Unhashable(ValueError):
    """An answer that needs an `equal`."""


def _class_of(value: Any, answer: Any, known: dict[Hashable, int], firsts: list[Any]) -> int:
    """The number of the value's class, a new one if it is in none."""
    equal = getattr(answer, "equal", None)
    hashable = _hashes(value)
    if not hashable and equal is None:
        raise _Unhashable(
            f"expected hashable answers, such as text or numbers, got {inline(value)} of type"
            f" {type(value).__name__}; return int(x) or float(x) of an array, or give"
            " answers.function(tok, f, equal=...) what says which are equal"
        )
    if hashable and value in known:
        return known[value]
    if equal is None:
        return len(firsts)
    return next((i for i, first in enumerate(firsts) if equal(first, value)), len(firsts))


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _said(string: Any, answer: Any) -> str:
    """The string that a function failed on, as text if it was read as one."""
    tokenizer = getattr(answer, "tokenizer", None)
    try:
        return inline(string if tokenizer is None else tokenizer.decode(string))
    except Exception:  # what failed may be the decoding
        return inline(string)
