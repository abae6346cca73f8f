"""Chain sums, for example 5 + 9 - 7, worked out line by line: 5 + 9 = 14, then 14 - 7 = 7."""

from __future__ import annotations

import re

LINE = re.compile(r" *(-?\d+) ([+-]) (\d+) = (-?\d+) *")


def solution(expression: str) -> list[str]:
    """The steps from left to right, for example ["5 + 9 = 14", "14 - 7 = 7"]."""
    value, *rest = expression.split()
    lines = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = int(value) + (int(term) if sign == "+" else -int(term))
        lines.append(f"{value} {sign} {term} = {result}")
        value = str(result)
    return lines


def is_easy(expression: str) -> bool:
    """Whether all results lie between 0 and 9: of others a small model gets almost none right."""
    return all(0 <= int(line.split()[-1]) <= 9 for line in solution(expression))


def answer(text: str) -> str | None:
    """What a solution says: the result of its last line."""
    lines = [line for line in text.split("\n") if line.strip()]
    found = LINE.fullmatch(lines[-1]) if lines else None
    return found[4] if found else None
