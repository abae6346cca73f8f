"""Whether a document is valid, by the jsonschema package.

Numbers are read as decimals, so that multipleOf is exact; formats that the package leaves out
without further packages are checked by Python's own modules.
"""

from __future__ import annotations

import datetime
import decimal
import json
import re
import urllib.parse
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import jsonschema
from jsonschema import validators


def referee(schema: Any) -> Callable[[str], bool]:
    """Whether a JSON text is valid under a schema."""
    exact = read(json.dumps(schema))
    kind = validators.validator_for(exact, default=jsonschema.Draft202012Validator)
    checker = jsonschema.FormatChecker()
    for name, check in FORMATS.items():
        checker.checks(name)(check)
    validator = kind(exact, format_checker=checker)

    def valid(text: str) -> bool:
        try:
            return validator.is_valid(read(text))
        except json.JSONDecodeError:
            return False

    return valid


def read(text: str) -> Any:
    return json.loads(text, parse_float=_decimal)


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except decimal.InvalidOperation:  # an exponent of twenty digits
        return Decimal(repr(float(text)))


def _time(text: object) -> bool:
    return _iso(datetime.time, f"{text}") and bool(re.search(r"(?i:z)$|[+-]\d\d:\d\d$", f"{text}"))


def _date_time(text: object) -> bool:
    date, _, time = f"{text}".upper().partition("T")
    return _iso(datetime.date, date) and len(date) == 10 and _time(time)


def _iso(kind: type[datetime.date] | type[datetime.time], text: str) -> bool:
    # Python reads at most six digits of a second's fraction.
    text = re.sub(r"(\.\d{1,6})\d*", r"\1", text.upper())
    try:
        kind.fromisoformat(text)
    except ValueError:
        return False
    return True


def _uri(text: object) -> bool:
    return bool(urllib.parse.urlsplit(f"{text}").scheme) and _reference(text)


def _reference(text: object) -> bool:
    try:
        urllib.parse.urlsplit(f"{text}")
    except ValueError:
        return False
    return re.search(r"[\s<>\"{}|\\^`\x00-\x1f]|%(?![0-9A-Fa-f]{2})", f"{text}") is None


def _pointer(text: object) -> bool:
    return not text or (f"{text}"[0] == "/" and not re.search("~(?![01])", f"{text}"))


def _duration(text: object) -> bool:
    units = re.sub(r"\d+(?=[A-Z])", "", f"{text}")
    date, _, time = units.partition("T")
    days, hours = date.removeprefix("P"), time
    whole = days == "W" or (days in "YMD" and hours in "HMS" and bool(days or hours))
    return whole and date[:1] == "P" and bool(time) == ("T" in units)


def _hostname(text: object) -> bool:
    labels = f"{text}".split(".")
    letters = all(re.fullmatch("[A-Za-z0-9-]{1,63}", label) for label in labels)
    return letters and not any(label[0] == "-" or label[-1] == "-" for label in labels)


def _of_strings(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or check(value)


FORMATS = {
    name: _of_strings(check)
    for name, check in {
        "time": _time,
        "date-time": _date_time,
        "uri": _uri,
        "uri-reference": _reference,
        "json-pointer": _pointer,
        "duration": _duration,
        "hostname": _hostname,
    }.items()
}
