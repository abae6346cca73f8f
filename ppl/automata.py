"""Regular expressions and JSON schemas as potentials: Phi(x) = 1 if x's bytes match, else 0."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from . import byte_dfa, token_tables
from .canonical import CanonicalAutomaton, own
from .schemas import schema_regex
from .segmentation import Unsegmented
from .token_automaton import TokenAutomaton, Tokenizer, token_bytes
from .token_tables import UNREACHABLE, TokenTables, Vocabulary


def regex(
    pattern: str, tokenizer: Tokenizer, canonical: bool | None = None
) -> TokenAutomaton | CanonicalAutomaton:
    r"""Strings whose text matches all of a regular expression.

    Phi(x) = 1 if the concatenated bytes of x's tokens are UTF-8 that matches `pattern` from the
    first byte to the last, else 0; so must a string that is cut by the horizon.  Tokens without
    bytes (control tokens) never occur.  The syntax is that of Rust's regex crate: no look-around,
    back-references or word boundaries, `\d` and `\w` are Unicode, `.` is any character but a
    newline.  ^ in front and $ at the end are allowed and say nothing.  Which alternative comes
    first and laziness do not matter.  The character U+10FFFF is reserved and never matches.

    Of a text's segmentations into tokens only the tokenizer's own is allowed, if that is known
    (`ppl.canonical`); canonical=False allows all.  That changes the law, from all segmentations of
    a text to the one on which the model was trained.

    A pattern is built once per vocabulary and process.

    Args:
        pattern: the expression.
        tokenizer: a tokenizer, as models.load returns it.
        canonical: whether only the tokenizer's own segmentation is allowed; by default, if it is
            known and its automaton is not too large.  The result's `segmentation` says which.

    Raises:
        ValueError: if the pattern is invalid, uses an unsupported feature, matches no string of
            this vocabulary, or needs too large an automaton; with canonical=True, if the own
            segmentation is not known.
    """
    why = "all, as asked"
    if canonical is not False:
        try:
            return own(pattern, tokenizer)
        except Unsegmented as error:
            if canonical:
                raise
            why = f"all: {error.got}"
    vocab = token_tables.vocabulary(token_bytes(tokenizer), tokenizer.eos)
    tables = _tables(pattern, vocab)
    arrays = (jnp.asarray(table) for table in tables)
    return TokenAutomaton(*arrays, eos=int(tokenizer.eos), segmentation=why)


def json_schema(
    schema: str | dict[str, Any], tokenizer: Tokenizer, canonical: bool | None = None
) -> TokenAutomaton | CanonicalAutomaton:
    r"""Strings that are JSON texts valid under a schema.

    Phi(x) = 1 if x's text is such a JSON text, of the following form, else 0.  The properties of an
    object come in the order of the schema; between two symbols of an object or array there is one
    space or none, and no newline; numbers have no leading zeros and integers no fraction; of the
    escapes, strings have \" \\ \/ \b \f \n \r \t.  Properties beyond those named in `properties`
    and items beyond `prefixItems` never occur, and a schema {} nests to a fixed depth.  A `pattern`
    must match all of the text between the quotes; `format` is one of `schemas.FORMATS`; `oneOf` is
    read as `anyOf`.

    Args:
        schema: a schema as a dict, or as JSON text.
        tokenizer, canonical: as in `regex`.

    Raises:
        ValueError: if the schema is invalid, has keywords that cannot be enforced (such as minimum,
            uniqueItems, not), or as in `regex`.
    """
    return regex(schema_regex(schema), tokenizer, canonical)


@functools.lru_cache(maxsize=64)
def _tables(pattern: str, vocab: Vocabulary) -> TokenTables:
    """Cached as NumPy arrays: device arrays made under a trace would leak from it."""
    tables = token_tables.build(byte_dfa.compile_regex(pattern), vocab)
    if tables.distance[0] == UNREACHABLE:
        raise ValueError(
            f"expected a pattern that some string of this tokenizer's {len(tables.classes)} tokens"
            f" matches, got {pattern!r}, which none does; loosen the pattern"
        )
    return tables
