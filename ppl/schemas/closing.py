"""Forms made ready to be written: without negations, exclusive alternatives and uniqueItems, with
lists of values that hold, and closed.

Closed means: where a schema names properties and says nothing of others, there are no others; nor
are there items beyond prefixItems.  What several schemas say together is closed as one, each
alternative by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from ..showing import shown
from . import merging
from .forms import AllOf, AnyOf, Form, Not, OneOf, Ref, Shape, Values, all_of, any_of, refused
from .logic import Logic, positive

MOST_ARRAYS = 1000
"""Arrays of different items that are written out."""
MOST_ALTERNATIVES = 64
"""Of what schemas say together; beyond it they are left apart."""


@shown
@dataclasses.dataclass(frozen=True)
class Ready:
    """A form of bools, `Shape`, `Values`, `AllOf`, `AnyOf`, `Ref`, and what it refers to."""

    form: Form
    definitions: dict[str, Form]

    def all(self) -> Iterator[Form]:
        """All forms, those inside others too."""
        waiting = [self.form, *self.definitions.values()]
        while waiting:
            form = waiting.pop()
            yield form
            waiting += inner(form)


def ready(form: Form, definitions: dict[str, Form]) -> Ready:
    """A form as read, made ready.

    Raises:
        Refused: if it has no finite value, refers to itself at once, or cannot be enforced.
    """
    _check_cycles(form, definitions)
    closing = _Closing(Logic(definitions))
    found = Ready(closing.close(form, True), closing.definitions)
    endless = _unproductive(found)
    if endless:
        remedy = "make one property on the way optional, or allow null"
        got = f"{', '.join(endless)}, whose every value holds another one inside"
        raise refused("#", "schemas with finite values", got, remedy)
    if found.form is False or found.form == Values(()):
        raise refused("#", "a schema that some value fits", "one that none does", "loosen it")
    return found


def inner(form: Form) -> list[Form]:
    """The forms directly inside of one."""
    match form:
        case AllOf(forms) | AnyOf(forms) | OneOf(forms):
            return list(forms)
        case Not(one):
            return [one]
        case Shape():
            found = [*form.first, *form.properties.values(), *form.by_pattern.values()]
            return found + [one for one in (form.rest, form.additional) if one is not None]
    return []


def counts_names(form: Form) -> bool:
    """Whether a form asks for several free properties, or may do so with what holds beside it."""
    if not isinstance(form, Shape) or "object" not in form.types:
        return False
    free = form.additional is not False or bool(form.by_pattern)
    return free and form.min_properties > max(len(form.required), 1)


class _Closing:
    def __init__(self, logic: Logic) -> None:
        self.logic = logic
        self.definitions: dict[str, Form] = {}
        self.numbers: dict[tuple[str, bool], str] = {}

    def close(self, form: Form, closed: bool) -> Form:
        form = positive(self.logic, form)
        match form:
            case Shape():
                return self._shape(form, closed)
            case AnyOf(forms):
                return any_of([self.close(one, closed) for one in forms])
            case AllOf(forms, too):
                return self._together(list(forms), closed or too)
            case Ref(name):
                return self._ref(name, closed)
        return form

    def _ref(self, name: str, closed: bool) -> Form:
        closed = closed and self._names(Ref(name)) != ([], [])
        if (name, closed) not in self.numbers:
            number = self.numbers[name, closed] = f"{len(self.numbers)}"
            self.definitions[number] = True
            self.definitions[number] = self.close(self.logic.definitions[name], closed)
        return Ref(self.numbers[name, closed])

    # What several forms say together.

    def _together(self, forms: list[Form], closed: bool) -> Form:
        """Alternatives of what holds together, each merged into one shape if it can be."""
        alternatives = self._alternatives(forms)
        if alternatives is None:
            return self._unmerged(forms, closed)
        return any_of([self._merged(one, closed) for one in alternatives])

    def _alternatives(self, forms: list[Form]) -> list[list[Form]] | None:
        """Lists of shapes and values, all of one of which hold; None if they are many."""
        found: list[list[Form]] = [[]]
        for form in forms:
            form = positive(self.logic, form)
            more: list[list[Form]] | None = [[form]]
            if isinstance(form, Ref):
                more = self._alternatives([self.logic.definitions[form.name]])
            elif isinstance(form, AllOf):
                more = None if form.closed else self._alternatives(list(form.forms))
            elif isinstance(form, AnyOf):
                parts = [self._alternatives([one]) for one in form.forms]
                known = [part for part in parts if part is not None]
                more = sum(known, []) if len(known) == len(parts) else None
            if more is None or len(found) * len(more) > MOST_ALTERNATIVES:
                return None
            found = [[*one, *other] for one in found for other in more]
        return found

    def _merged(self, forms: list[Form], closed: bool) -> Form:
        if any(form is False for form in forms):
            return False
        listed = next((one for one in forms if isinstance(one, Values)), None)
        if listed is not None:
            holds = [v for v in listed.values if all(self.logic.holds(f, v) for f in forms)]
            return Values(tuple(holds)) if holds else False
        shape = Shape()
        for form in forms:
            both = merging.both(self.logic, shape, form) if isinstance(form, Shape) else shape
            if both is None:
                return self._unmerged(forms, closed)
            shape = both
        return self._shape(shape, closed)

    def _unmerged(self, forms: list[Form], closed: bool) -> Form:
        """Forms that are left apart, closed as one."""
        speaking = [one for one in forms if self._names(one) != ([], [])]
        if len(speaking) <= 1:
            return all_of([self.close(one, closed) for one in forms])
        found = [self.close(one, False) for one in forms]
        if closed and not any(self._open(one) for one in forms):
            names, keys = self._names(AllOf(tuple(forms)))
            end = Shape(
                properties=dict.fromkeys(names, True),
                by_pattern=dict.fromkeys(keys, True),
                additional=False,
            )
            found.append(end)
        return all_of(found)

    def _names(self, form: Form) -> tuple[list[str], list[str]]:
        """The properties, by name and by pattern, of which it speaks."""
        shapes = list(self._shapes(form, set()))
        names = [name for one in shapes for name in one.properties]
        keys = [key for one in shapes for key in one.by_pattern]
        return list(dict.fromkeys(names)), list(dict.fromkeys(keys))

    def _open(self, form: Form) -> bool:
        """Whether it says what other properties are."""
        return any(one.additional is not None for one in self._shapes(form, set()))

    def _shapes(self, form: Form, seen: set[str]) -> Iterator[Shape]:
        """The shapes that say something of the value itself."""
        if isinstance(form, Shape):
            yield form
        elif isinstance(form, Ref):
            if form.name not in seen:
                yield from self._shapes(self.logic.definitions[form.name], seen | {form.name})
        else:
            for one in inner(form):
                yield from self._shapes(one, seen)

    # Shapes.

    def _shape(self, shape: Shape, closed: bool) -> Form:
        if not shape.types:
            return False
        if shape.distinct and "array" in shape.types:
            return self._distinct(shape)
        first = tuple(self.close(one, True) for one in shape.first)
        rest = None if shape.rest is None else self.close(shape.rest, True)
        ends = closed and shape.first and rest is None
        named = {name: self.close(one, True) for name, one in shape.properties.items()}
        keys = {key: self.close(one, True) for key, one in shape.by_pattern.items()}
        more = None if shape.additional is None else self.close(shape.additional, True)
        if closed and more is None and (named or keys):
            more = False
        if more is not None:
            missing = [name for name in shape.required if name not in named]
            named |= {n: self.close(self.logic.property(shape, n), True) for n in missing}
        return dataclasses.replace(
            shape,
            first=first,
            rest=False if ends else rest,
            distinct=False,
            properties=named,
            by_pattern=keys,
            additional=more,
        )

    def _distinct(self, shape: Shape) -> Form:
        """Arrays without equal items, if there are few."""
        most = shape.max_items
        plain = dataclasses.replace(shape, distinct=False)
        if most is not None and most <= 1:
            return self._shape(plain, True)
        if most is None:
            values = self._finite(True if shape.rest is None else shape.rest)
            most = None if values is None else len(shape.first) + len(values)
        arrays = None if most is None else self._arrays(shape, most)
        if arrays is None:
            expected = f"uniqueItems with at most {MOST_ARRAYS} different arrays"
            remedy = "list few values in an enum of items, or leave it away and check the result"
            raise refused(shape.path, expected, "uniqueItems of items without end", remedy)
        other = shape.types - {"array"}
        rest = [self._shape(dataclasses.replace(plain, types=other), True)] if other else []
        return any_of([*rest, Values(tuple(arrays))] if arrays else rest)

    def _arrays(self, shape: Shape, most: int) -> list[list[Any]] | None:
        whole, longer = [[]], [[]]
        for place in range(most):
            values = self._finite(self.logic.item(shape, place))
            if values is None:
                return None
            longer = [[*a, v] for a, v in itertools.product(longer, values)]
            longer = [one for one in longer if self.logic.holds(Shape(distinct=True), one)]
            whole += longer
            if len(whole) > MOST_ARRAYS:
                return None
            if not longer:
                break
        return [one for one in whole if self.logic.holds(shape, one)]

    def _finite(self, form: Form) -> list[Any] | None:
        """All its values, if there are few."""
        form = positive(self.logic, form)
        match form:
            case Values(values):
                return list(values)
            case Ref(name):
                return self._finite(self.logic.definitions[name])
            case Shape() if form.types <= {"boolean", "null"}:
                return [v for v in (None, False, True) if self.logic.holds(form, v)]
            case AllOf(forms):
                found = [self._finite(one) for one in forms]
                some = next((one for one in found if one is not None), None)
                return None if some is None else [v for v in some if self.logic.holds(form, v)]
            case False:
                return []
        return None


def _check_cycles(form: Form, definitions: dict[str, Form]) -> None:
    """Refuse what refers to itself without anything between."""

    def follow(one: Form, above: tuple[str, ...]) -> None:
        if isinstance(one, Ref):
            if one.name in above:
                got = " -> ".join([*above, one.name])
                remedy = "put it into a property or an item"
                raise refused("#", "references that lead somewhere", got, remedy)
            follow(definitions[one.name], (*above, one.name))
        elif not isinstance(one, Shape):
            for inside in inner(one):
                follow(inside, above)

    for start in (form, *map(Ref, definitions)):
        follow(start, ())


def _unproductive(found: Ready) -> list[str]:
    """The definitions without a finite value: all but the least fixed point of those with one."""
    done: set[str] = set()

    def ends(form: Form) -> bool:
        match form:
            case Ref(name):
                return name in done
            case AllOf(forms):
                return all(map(ends, forms))
            case AnyOf(forms):
                return any(map(ends, forms))
            case Shape():
                return _ends(form, ends)
        return True

    while True:
        more = {name for name, form in found.definitions.items() if ends(form)}
        if more == done:
            return [f"definition {name}" for name in found.definitions if name not in done]
        done = more


def _ends(shape: Shape, ends: Any) -> bool:
    if shape.types - {"array", "object"}:
        return True
    array = "array" in shape.types and all(
        ends(shape.first[i] if i < len(shape.first) else shape.rest) for i in range(shape.min_items)
    )
    required = [shape.properties[name] for name in shape.required if name in shape.properties]
    return array or ("object" in shape.types and all(map(ends, required)))
