"""What texts answer, and which answers are the same."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from samplers.search import answers


class Characters:
    """A tokenizer of characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TOK = Characters()


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 1,000 in all", 1000),
        ("= 1000.0", 1000),
        ("$1,234,567.50.", Fraction(2469135, 2)),
        ("first 12, then -7", -7),
        ("5-3", 3),
        ("x = \u22123", -3),
        ("1/2 of it", Fraction(1, 2)),
        ("0.5", Fraction(1, 2)),
        ("1/2.5", Fraction(5, 2)),
        ("about 1.5e3", 1500),
        ("the answer is 42.", 42),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_last_number(text: str, value: Any):
    assert answers.last_number(TOK)(ids(text)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"so \boxed{12}, no, \boxed{1{,}000}", 1000),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac12}", Fraction(-1, 2)),
        (r"\boxed{ x^{2} + 1 }", "x^{2}+1"),
        (r"\boxed{\text{yes}}", "yes"),
        (r"\boxed{50\%}", 50),
        (r"\fbox{7}", 7),
        (r"\boxed{}", None),
        (r"\boxed{1", None),
        ("7", None),
    ],
)
def test_the_last_box(text: str, value: Any):
    assert answers.boxed(TOK)(ids(text)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A or B?  The answer is (C).", "C"),
        ("Answer: **D**", "D"),
        (r"so \boxed{\text{(B)}}", "B"),
        ("(A) is wrong, hence B", "B"),
        ("A is an article; (D) is the one", "D"),
        ("Because.", None),
        ("E.", None),
    ],
)
def test_the_letter_of_a_choice(text: str, value: Any):
    assert answers.choice_letter(TOK)(ids(text)) == value


def test_other_letters():
    assert answers.choice_letter(TOK, "ABCDE")(ids("(E)")) == "E"


def test_ids_come_in_the_order_of_first_appearance():
    found, failures = answers.ids_of(["b", "", "a", "b", "c"], lambda text: text or None)
    assert found.tolist() == [0, -1, 1, 0, 2] and found.dtype == np.int32 and not failures


def test_nan_is_no_answer():
    """It is equal to nothing, so that each would be an answer of its own."""
    found, failures = answers.ids_of([np.nan, 1.0, np.float32("nan"), 1], lambda x: x)
    assert found.tolist() == [-1, 0, -1, 0] and not failures


def test_equal_is_asked_of_the_first_of_each_class():
    """Classes of what does not hash, within 1 of the first member: not transitive, and in order."""
    asked: list[tuple[int, int]] = []

    def near(first: list[int], new: list[int]) -> bool:
        asked.append((first[0], new[0]))
        return abs(first[0] - new[0]) <= 1

    answer = answers.function(TOK, lambda text: [int(text)], equal=near)
    found, failures = answers.ids_of([ids(x) for x in ("1", "5", "2", "3", "1")], answer)
    assert found.tolist() == [0, 1, 0, 2, 0] and not failures
    assert asked == [(1, 5), (1, 2), (1, 3), (5, 3), (1, 1)]
    # What hashes is asked about once.
    asked.clear()
    hashed = answers.function(TOK, lambda text: (int(text),), equal=near)
    assert answers.ids_of([ids(x) for x in ("1", "1", "2", "2")], hashed)[0].tolist() == [0] * 4
    assert asked == [(1, 2)]


def test_what_raises_is_counted_and_has_no_answer():
    def read(text: str) -> int:
        return 1 // len(text)

    def never(first: int, new: int) -> bool:
        raise TimeoutError("too long")

    found, failures = answers.ids_of([ids("ab"), [], []], answers.function(TOK, read))
    assert found.tolist() == [0, -1, -1] and len(failures) == 2
    assert failures[0] == "ZeroDivisionError: integer division or modulo by zero on ''"
    found, failures = answers.ids_of([ids("a"), ids("b")], answers.function(TOK, str, equal=never))
    assert found.tolist() == [0, -1] and failures == ["TimeoutError: too long on 'b'"]


def test_an_answer_without_hash_needs_equal():
    with pytest.raises(ValueError, match=r"expected hashable answers, .*, got \[1\] of type list;"):
        answers.ids_of([[1]], lambda string: string)


@pytest.mark.bad_input
def test_what_is_no_function():
    with pytest.raises(ValueError, match=r"expected read to be a function of \(text\), got 3"):
        answers.function(TOK, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"expected equal to be a function of \(one, other\)"):
        answers.function(TOK, str, equal=lambda one: True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected letters to choose from, got ''"):
        answers.choice_letter(TOK, "")
