"""The schemas, each with documents that are valid under it and documents that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    name: str
    schema: Any
    valid: list[Any]
    invalid: list[Any]


def load() -> list[Case]:
    """All of them, a JSON list of name, schema, valid and invalid documents in each line."""
    lines = Path(__file__).with_name("cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [Case(*json.loads(line)) for line in lines]
