"""Rendering of chat templates: jinja2 programs that come with a model, run in jinja2's immutable
sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from .template_limits import LimitedEnvironment, generate

Message = Mapping[str, Any]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it
    prints its body.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which prompts must not be.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _environment() -> jinja2.Environment:
    environment = LimitedEnvironment(
        {"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
    )
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template, and the variables that it reads."""
    environment = _environment()
    read = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(read)


TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put behind the message that is to be continued, as transformers does."""


def _tagged(messages: Sequence[Message]) -> list[Message]:
    """The messages with `TAG` behind the last one's text.

    Raises:
        ValueError: if the last one has no text.
    """
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + TAG
        return [*messages[:-1], last]
    parts = [dict(part) for part in content or ()]
    for part in reversed(parts):
        if isinstance(part.get("text"), str):
            part["text"] += TAG
            last["content"] = parts
            return [*messages[:-1], last]
    raise ValueError(
        "expected a last message with a text to be continued, got none; give it a content, which"
        " may be empty"
    )


def _cut(text: str) -> str:
    """The text up to `TAG`; without spaces at its end if the template trims messages."""
    before, found, behind = text.rpartition(TAG.strip())
    if not found:
        raise ValueError(
            "expected a template that writes the last message, got a text without it; leave"
            " continue_final_message out"
        )
    return before if behind.startswith(TAG[len(TAG.strip()) :]) else before.rstrip()


def render(
    source: str,
    messages: Sequence[Message],
    *,
    bos_token: str,
    eos_token: str,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation by a template's `source`.

    Templates are untrusted programs: the sandbox refuses private attributes and changes to its
    arguments, and limits time and memory (`template_limits`).

    Args:
        source: the template.
        messages: the conversation.
        bos_token, eos_token: how these tokens are written.
        continue_final_message: whether the text ends where the last message does, not where the
            assistant's answer begins.
        variables: what else the template reads, such as `tools` and `documents` (None by default)
            or `add_generation_prompt`.

    Raises:
        ValueError: if the template is malformed, reaches out of the sandbox, takes too long,
            refuses the messages, or does not read one of the variables.
    """
    variables = dict(variables or {})
    given = {
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": not continue_final_message,
        "tools": None,
        "documents": None,
        **variables,
        "messages": _tagged(messages) if continue_final_message else list(messages),
    }
    try:
        template, read = _compile(source)
        unread = sorted(variables.keys() - read - {"add_generation_prompt"})
        text = "" if unread else generate(template, given)
    except Exception as error:  # a template is a program, and may fail as any does
        raise ValueError(
            f"expected messages that the model's chat template accepts, got {type(error).__name__}:"
            f" {error};"
            " check the roles and contents of the messages, or build the prompt with encode(text)"
        ) from error
    if unread:
        raise ValueError(
            f"expected variables that the model's chat template reads ({', '.join(sorted(read))}),"
            f" got {', '.join(unread)}; check the spelling, or leave them out"
        )
    return _cut(text) if continue_final_message else text
