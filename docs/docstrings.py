"""How docstrings, which are plain text, become Markdown."""

import re

import griffe

WORD_JOINER = "\N{WORD JOINER}"


class Plain(griffe.Extension):
    """Keeps the `<` of x_<t from starting an HTML tag."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = re.sub(r"<(?=\S)", "<" + WORD_JOINER, obj.docstring.value)
