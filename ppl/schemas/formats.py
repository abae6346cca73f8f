"""The formats of strings as ECMA-262 expressions, and those of numbers as bounds."""

from __future__ import annotations

from decimal import Decimal

from .ranges import Bounds

_LEAP = "0[48]|[2468][048]|[13579][26]"
_YEAR = "000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3}"
_DAY = (
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8])"
)
DATE = f"(?:(?:{_YEAR})-(?:{_DAY})|(?:[0-9]{{2}}(?:{_LEAP})|(?:{_LEAP})00)-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_CLOCK})"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_GROUP = "[0-9a-fA-F]{1,4}"
_LAST = f"(?:{_GROUP}:{_GROUP}|{IPV4})"
IPV6 = "(?:{})".format(
    "|".join(
        [f"(?:{_GROUP}:){{6}}{_LAST}", f"::(?:{_GROUP}:){{5}}{_LAST}"]
        + [
            f"(?:{_GROUP}(?::{_GROUP}){{0,{before}}})?::(?:{_GROUP}:){{{4 - before}}}{_LAST}"
            for before in range(5)
        ]
        + [f"(?:{_GROUP}(?::{_GROUP}){{0,5}})?::{_GROUP}", f"(?:{_GROUP}(?::{_GROUP}){{0,6}})?::"]
    )
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_DATES = "(?:[0-9]+D|[0-9]+M(?:[0-9]+D)?|[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?)"
_TIMES = "T(?:[0-9]+S|[0-9]+M(?:[0-9]+S)?|[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?)"
_FREE, _HEX = r"A-Za-z0-9\-._~!$&'()*+,;=", "%[0-9A-Fa-f]{2}"
_PATH = f"(?:[{_FREE}:@]|{_HEX})"
_HOST = (
    rf"(?:\[(?:{IPV6}|[vV][0-9A-Fa-f]+\.[{_FREE}:]+)\]|(?:[{_FREE}]|{_HEX})*)"  # IPv4 is a name too
)
_AUTHORITY = f"(?:(?:[{_FREE}:]|{_HEX})*@)?{_HOST}(?::[0-9]*)?"
_TAIL = f"(?:\\?(?:{_PATH}|[/?])*)?(?:#(?:{_PATH}|[/?])*)?"
_ROOTED = f"//{_AUTHORITY}(?:/{_PATH}*)*|/(?:{_PATH}+(?:/{_PATH}*)*)?"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*"
_POINTER = "(?:/(?:[^/~]|~[01])*)*"

STRINGS: dict[str, str] = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[Tt]{TIME}",
    "duration": f"P(?:{_DATES}(?:{_TIMES})?|{_TIMES}|[0-9]+W)",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": IPV4,
    "ipv6": IPV6,
    "hostname": rf"{_LABEL}(?:\.{_LABEL})*",
    "email": rf"{_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})*",
    "uri": f"{_SCHEME}:(?:{_ROOTED}|{_PATH}+(?:/{_PATH}*)*)?{_TAIL}",
    "uri-reference": (
        f"(?:{_SCHEME}:(?:{_ROOTED}|{_PATH}+(?:/{_PATH}*)*)?"
        f"|(?:{_ROOTED}|(?:[{_FREE}@]|{_HEX})+(?:/{_PATH}*)*)?){_TAIL}"
    ),
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "byte": "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "password": "[^]*",
    "binary": "[^]*",
}
"""Those of JSON Schema and OpenAPI that are regular.  Dates have years from 0001, times no leap
seconds; email addresses no quotes and no address in the place of a domain; addresses no zone.
"""
LONGEST = {"hostname": 253}


def _integers(bits: int) -> Bounds:
    return Bounds(Decimal(-(1 << (bits - 1))), Decimal((1 << (bits - 1)) - 1))


NUMBERS = {"int32": _integers(32), "int64": _integers(64), "float": Bounds(), "double": Bounds()}
