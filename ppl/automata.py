"""Regular expressions and JSON schemas as potentials: Phi(x) = 1 if x's bytes match, else 0."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax.numpy as jnp

from . import byte_dfa, regex_syntax, schemas, token_tables
from .byte_dfa import TooLarge
from .canonical import CanonicalAutomaton, own
from .context_free import Grammar, parsed
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
    back-references or word boundaries, `\d`, `\w` and `\s` are Unicode's, `.` is any character but
    a newline.  Anchors (^ $ \A \z \Z) at the edges of an alternative are allowed and say nothing.
    Which alternative comes first and laziness do not matter.  The character U+10FFFF is reserved
    and never matches.

    What Python's re takes and this does not is refused, with its position: {"a": 1} is \{"a": 1},
    a{,3} is a{0,3}.  What both read, but not alike, gets a warning: [ && -- ~~ in a class make it
    a set of sets, and (?x) reaches into classes.  Unicode's \w has the marks and joiners that
    Python's lacks, and its \s lacks U+001C to U+001F.

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
    built = _regex(pattern, tokenizer, canonical)
    for doubt in regex_syntax.read(pattern).doubtful:
        warnings.warn(
            f"{pattern!r} has {doubt}; Python's re takes it for plain characters, which are written"
            " with a \\ in front",
            stacklevel=2,
        )
    return built


def _regex(
    pattern: str, tokenizer: Tokenizer, canonical: bool | None
) -> TokenAutomaton | CanonicalAutomaton:
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
    schema: str | bool | dict[str, Any], tokenizer: Tokenizer, canonical: bool | None = None
) -> TokenAutomaton | CanonicalAutomaton | Grammar:
    r"""Strings that are JSON texts valid under a schema.

    Phi(x) = 1 if x's text is such a JSON text, of the following form, else 0.

    - The properties of an object come in the order of the schema, free ones after them; between
      two symbols of an object or array there is one space or none, and no newline.
    - An object that names properties (`properties`, `patternProperties`) has no others unless
      `additionalProperties` says what they are, nor an array items beyond `prefixItems`.
    - Numbers have no leading zeros, integers no fraction, and numbers between bounds no exponent.
      A constant number is written in decimals, and as json.dumps does.
    - Of the escapes, strings have \" \\ \b \f \n \r \t, and \u00XX for other control characters.
      Constants and names are written as json.dumps(..., ensure_ascii=False) does.

    A schema that is regular and not too large becomes tables on the device, as `regex` does; any
    other is parsed on the host, as by `grammar`.  The result's `way` says which, and why.  What a
    parser cannot know: the tokenizer's own segmentation, so that all are allowed (`segmentation`);
    and whether a string can still be completed within the horizon, so leave room in max_tokens.
    The parser writes a constant number in its shortest decimals alone, U+007F as \u007f, and no
    escape \u at all where several open objects must hold together; tables also allow \/.

    A keyword that neither way enforces is refused by name (contains, uniqueItems of items without
    end, unknown keywords, formats and drafts, references to other documents); so is what only
    looks right, such as numbers that a double does not hold in a schema that is parsed.  Patterns
    are those of ECMA-262, and are searched for.  `format` is enforced; formats are narrower than
    their standards where `schemas.formats` says so.

    Args:
        schema: a schema as a dict, or as JSON text; by default of draft 2020-12.
        tokenizer: as in `regex`.
        canonical: as in `regex`; True asks for tables.

    Raises:
        ValueError: if the schema is invalid or has what cannot be enforced, naming path, what was
            expected, what came and the remedy; with canonical=True, also if it takes a parser.
    """
    plan = schemas.plan(schema)
    why = plan.why
    if plan.pattern is not None:
        try:
            return _regex(plan.pattern, tokenizer, canonical)
        except TooLarge as error:
            why = f"tables that are small ({str(error).partition(', from')[0]})"
    if canonical:
        raise ValueError(
            "expected a schema that fits into tables, since a parser does not know a tokenizer's"
            f" own segmentation, got one with {why}; leave canonical away, or simplify it"
        )
    return parsed(plan.grammar(why), tokenizer, plan.counts_names(), f"parser: {why}")


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
