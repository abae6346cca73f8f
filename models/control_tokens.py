"""Texts of others inside of a prompt: what spells a control token there stays text.

A template's own control tokens and those that a user wrote look alike once it is rendered.  So what
spells one in the user's texts, or begins one at their end, is marked before; afterwards the
template's own are given names that no text has, the marks become what they stand for, and a
tokenizer that knows the control tokens by these names encodes the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

OPEN, CLOSE, ZERO, NAME = "\ufdd0", "\ufdd1", 0xFDD2, "\ufddc"
"""Noncharacters, which no text may contain: around a number, its digit 0, and what stands in front
of the number in a name.
"""


class ControlTokens:
    """The control tokens of a tokenizer.

    Raises:
        ValueError: if the tokenizer needs one of them by its name.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder().values()
        self.names = {t.content: _number(i, NAME) for i, t in enumerate(added) if t.special}
        self.backend = _renamed(backend, self.names)
        longest_first = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def marked(self, value: Any, marks: list[str]) -> Any:
        """`value` in which what spells a control token is a number, of which `marks` is told.

        Raises:
            ValueError: if a text contains the noncharacters that are used here.
        """
        if isinstance(value, str):
            return self._marked_text(value, marks)
        if isinstance(value, Mapping):
            return {
                self.marked(key, marks): self.marked(entry, marks) for key, entry in value.items()
            }
        if isinstance(value, Sequence):
            return [self.marked(entry, marks) for entry in value]
        return value

    def _marked_text(self, text: str, marks: list[str]) -> str:
        if re.search("[\ufdd0-\ufdef]", text):
            raise ValueError(
                "expected texts without the noncharacters U+FDD0 to U+FDEF, got one with; remove"
                " them, or pass literal=False"
            )

        def mark(found: re.Match[str] | str) -> str:
            marks.append(found if isinstance(found, str) else found[0])
            return _number(len(marks) - 1)

        text = self.pattern.sub(mark, text)
        # A token that begins here may end in the text that follows.
        body = text.rstrip()
        starts = (name[:size] for name in self.names for size in range(1, len(name)))
        start = max((s for s in starts if body.endswith(s)), key=len, default="")
        if not start:
            return text
        return body[: -len(start)] + mark(start) + text[len(body) :]

    def encode(self, rendered: str, marks: list[str]) -> list[int]:
        """The token ids of a rendered text, in which `marks` are text."""
        text = self.pattern.sub(lambda found: self.names[found[0]], rendered)
        for number, literal in enumerate(marks):
            mark = _number(number)
            text = text.replace(mark, literal)
            text = text.replace(json.dumps(mark)[1:-1], json.dumps(literal)[1:-1])
        return self.backend.encode(text, add_special_tokens=False).ids


def _number(value: int, begin: str = OPEN) -> str:
    return begin + "".join(chr(ZERO + int(digit)) for digit in str(value)) + CLOSE


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The same tokenizer, in which the control tokens have other names."""
    whole = json.loads(backend.to_str())
    for entry in whole["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    model = whole["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    whole["post_processor"] = None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(
            "expected a tokenizer whose control tokens no merge makes, got one in which"
            f" {error}; pass literal=False"
        ) from error
