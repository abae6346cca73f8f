"""JSON schemas read into forms: every keyword is understood, an annotation, or refused by name."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from typing import Any

from .forms import AnyOf, Form, Not, OneOf, Ref, Shape, Values, all_of, any_of, refused
from .shapes import SHAPE_KEYWORDS, shape

DRAFTS = {
    "http://json-schema.org/draft-04/schema": 4,
    "http://json-schema.org/draft-06/schema": 6,
    "http://json-schema.org/draft-07/schema": 7,
    "https://json-schema.org/draft/2019-09/schema": 2019,
    "https://json-schema.org/draft/2020-12/schema": 2020,
}
ANNOTATIONS = frozenset(
    "title description default examples example $schema $comment deprecated readOnly writeOnly"
    " contentEncoding contentMediaType contentSchema $vocabulary externalDocs xml discriminator"
    " markdownDescription deprecationMessage doNotSuggest defaultSnippets enumDescriptions"
    " markdownEnumDescriptions enumNames tsType $defs definitions $id id $anchor".split()
)
"""They say nothing of which values are valid; so does what begins with "x-"."""
VALUES = {"enum", "const", "default", "examples", "example"}
SINCE = {
    "const": (6, 2020),
    "contains": (6, 2020),
    "propertyNames": (6, 2020),
    "if": (7, 2020),
    "then": (7, 2020),
    "else": (7, 2020),
    "dependencies": (4, 7),
    "additionalItems": (4, 2019),
    "prefixItems": (2020, 2020),
    "dependentRequired": (2019, 2020),
    "dependentSchemas": (2019, 2020),
    "unevaluatedProperties": (2019, 2020),
    "unevaluatedItems": (2019, 2020),
    "minContains": (2019, 2020),
    "maxContains": (2019, 2020),
}
"""The drafts that have a keyword, from and to; in others it says nothing."""


def read(schema: Any) -> tuple[Form, dict[str, Form]]:
    """The form of a schema, and those it refers to by name.

    Raises:
        Refused: naming path, what was expected, what came, and the remedy.
    """
    reader = _Reader(schema)
    form = reader.form(schema, "#")
    return form, reader.definitions


def parse(text: str) -> Any:
    """The schema in a JSON text.

    Raises:
        ValueError: if it is none, or an object in it has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"expected a JSON schema, got text that is not JSON: {error}; correct it there"
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"expected a JSON schema whose objects have a key once, got {twice!r} twice in one;"
            " merge them"
        )
    return found


class _Reader:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.definitions: dict[str, Form] = {}
        self.draft = self._draft(root)
        self.places: dict[str, Any] = {}
        self.home: dict[int, tuple[str, Any]] = {}
        if isinstance(root, dict):
            self._find("", root, root)
        self.combine: dict[str, Callable[[dict[str, Any], Any, str], Form]] = {
            "allOf": lambda _, value, path: all_of(self.forms(value, path)),
            "anyOf": lambda _, value, path: any_of(self.forms(value, path)),
            "oneOf": lambda _, value, path: OneOf(tuple(self.forms(value, path)), path),
            "not": lambda _, value, path: Not(self.form(value, path), path),
            "enum": lambda _, value, path: Values(tuple(_filled(value, path))),
            "const": lambda _, value, path: Values((value,)),
            "$ref": self._ref,
            "if": self._if,
            "dependentRequired": self._dependent,
            "dependentSchemas": self._dependent,
            "dependencies": self._dependent,
        }

    def form(self, schema: Any, path: str) -> Form:
        if isinstance(schema, bool) and self.draft > 4:
            return schema
        if not isinstance(schema, dict):
            raise refused(path, "a schema as an object", repr(schema), "write {} for any value")
        self._check(schema, path)
        found: list[Form] = []
        # Properties come in the order of the schema, those of other schemas before or after.
        own = [key for key in schema if key in SHAPE_KEYWORDS]
        place = "properties" if "properties" in own else next(iter(own), None)
        for key, value in schema.items():
            if key in self.combine:
                found.append(self.combine[key](schema, value, f"{path}/{key}"))
            elif key == place:
                found.append(shape(schema, path, self._inside, self.draft))
        return all_of(found, closed=self._closed(schema, path))

    def _inside(self, schema: Any, path: str) -> Form:
        """The form of properties or items; draft 4 knows booleans for those that are not named."""
        if isinstance(schema, bool) and path.rpartition("/")[2].startswith("additional"):
            return schema
        return self.form(schema, path)

    def forms(self, schemas: Any, path: str) -> list[Form]:
        return [self.form(one, f"{path}/{i}") for i, one in enumerate(_filled(schemas, path))]

    def _check(self, schema: dict[str, Any], path: str) -> None:
        known = {*self.combine, *SHAPE_KEYWORDS, *ANNOTATIONS, "then", "else", "items"}
        unknown = sorted(k for k in schema.keys() - known if not k.startswith("x-"))
        if unknown:
            raise refused(
                path,
                "keywords that can be enforced, or that are known to say nothing of values",
                ", ".join(unknown),
                'remove them, or let the names of your own begin with "x-"',
            )
        for key in schema.keys() & SINCE.keys():
            first, last = SINCE[key]
            if not first <= self.draft <= last:
                draft = next(name for name, number in DRAFTS.items() if number == self.draft)
                raise refused(
                    path,
                    f"keywords of {draft}",
                    f"{key}, which says nothing there",
                    f'say which draft is meant by "$schema" (it has {key} from {first} to {last})',
                )
        if "$ref" in schema and self.draft <= 7 and (beside := _asserting(schema, self.combine)):
            raise refused(
                path,
                f"$ref alone, since in draft {self.draft} it hides what is beside it",
                ", ".join(beside),
                "put both into an allOf, or remove what is hidden",
            )

    def _closed(self, schema: dict[str, Any], path: str) -> bool:
        """Whether unevaluatedProperties closes what several schemas say together."""
        if schema.get("unevaluatedProperties", True) is not False:
            return False
        beside = sorted(schema.keys() & self.combine.keys() - {"allOf", "$ref", "enum", "const"})
        if beside:
            raise refused(
                path,
                "unevaluatedProperties: false beside allOf and $ref alone",
                ", ".join(beside),
                "use additionalProperties: false in each alternative",
            )
        return bool(schema.keys() & {"allOf", "$ref"})

    def _draft(self, root: Any) -> int:
        name = root.get("$schema") if isinstance(root, dict) else None
        if name is None:
            return 2020
        plain = str(name).removesuffix("#").rstrip("/")
        found = {key.partition("://")[2]: number for key, number in DRAFTS.items()}
        if plain == "http://json-schema.org/schema":
            return 2020
        number = found.get(plain.partition("://")[2])
        if number is None:
            raise refused("#/$schema", "a draft among " + ", ".join(DRAFTS), repr(name), "correct")
        return number

    # References.

    def _find(self, base: str, resource: Any, node: Any) -> None:
        """Note of every schema the one whose name its references start from, and all names."""
        if isinstance(node, dict):
            name = node.get("id" if self.draft == 4 else "$id")
            if isinstance(name, str) and not name.startswith("#"):
                base, resource = urllib.parse.urljoin(base, name).removesuffix("#"), node
                self.places[base] = node
            self.home[id(node)] = base, resource
            anchor = node.get("$anchor", name.removeprefix("#") if isinstance(name, str) else "")
            self.places.setdefault(f"{base}#{anchor}", node)
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            if isinstance(child, dict | list) and key not in VALUES:
                self._find(base, resource, child)

    def _ref(self, schema: dict[str, Any], value: Any, path: str) -> Form:
        if not isinstance(value, str):
            raise refused(path, "a reference as a string", repr(value), "write a path as #/$defs/A")
        base, resource = self.home[id(schema)]
        absolute = base + value if value.startswith("#") else urllib.parse.urljoin(base, value)
        if absolute not in self.definitions:
            address, _, fragment = absolute.partition("#")
            start = resource if address == base else self.places.get(address)
            node = self.places.get(absolute) if fragment else start
            if node is None:
                node = self._target(start, fragment, value, path)
            self.definitions[absolute] = True
            self.definitions[absolute] = self.form(node, value)
        return Ref(absolute)

    def _target(self, node: Any, fragment: str, reference: str, path: str) -> Any:
        """Where a path leads."""
        if node is None or not fragment.startswith("/"):
            expected = "a reference to a place in this schema"
            raise refused(path, expected, repr(reference), "copy what it names into $defs")
        for step in urllib.parse.unquote(fragment).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and step.isdigit() and int(step) < len(node):
                node = node[int(step)]
            elif isinstance(node, dict) and step in node:
                node = node[step]
            else:
                got = f"{reference!r}, where {step!r} is not"
                remedy = "correct the path, or add its schema to $defs"
                raise refused(path, "a reference to what is there", got, remedy)
        return node

    # Conditions.

    def _if(self, schema: dict[str, Any], value: Any, path: str) -> Form:
        if not schema.keys() & {"then", "else"}:
            return True
        condition, parent = self.form(value, path), path.removesuffix("/if")
        then, otherwise = (
            self.form(schema.get(key, True), f"{parent}/{key}") for key in ("then", "else")
        )
        return any_of([all_of([condition, then]), all_of([Not(condition, path), otherwise])])

    def _dependent(self, schema: dict[str, Any], value: Any, path: str) -> Form:
        """For each name: it is not there, or what depends on it holds."""
        if not isinstance(value, dict):
            raise refused(path, "an object by names", repr(value), "map each name to what follows")
        found: list[Form] = []
        for name, follows in value.items():
            if isinstance(follows, list) and not path.endswith("Schemas"):
                also: Form = Shape(required=(name, *_names(follows, f"{path}/{name}")))
            elif path.endswith("Required"):
                raise refused(f"{path}/{name}", "a list of names", repr(follows), "list them")
            else:
                also = self.form(follows, f"{path}/{name}")
            found.append(AnyOf((Shape(properties={name: False}), also)))
        return all_of(found)


def _filled(values: Any, path: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise refused(path, "a list with at least one entry", repr(values), "list what is allowed")
    return values


def _names(values: Any, path: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise refused(path, "a list of names", repr(values), "correct it")
    return values


def _asserting(schema: dict[str, Any], combine: dict[str, Any]) -> list[str]:
    return sorted(key for key in schema if key in combine or key in SHAPE_KEYWORDS if key != "$ref")
