"""Chat templates cannot run on: neither in time nor in what they write; and what others do, these
may do."""

from __future__ import annotations

import time
from typing import Any

import pytest

from models import chat_template, template_limits
from models.template_limits import weight

CONVERSATION = [
    {"role": "user", "content": "hi <think>no</think> there", "id": 1_700_000_000},
    {"role": "assistant", "content": "yes"},
]


def render(source: str) -> str:
    return chat_template.render(source, CONVERSATION, bos_token="<s>", eos_token="</s>")


LOOP = "{%% for i in range(300) %%}%s{%% endfor %%}"
LONG = {
    "nested loops": LOOP % (LOOP % "{% set x = i %}"),
    "loops that write": LOOP % (LOOP % "{{ i }}"),
    "a macro twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a loop of its own": "{% for i in [1, 2] recursive %}{% if loop.depth < 40 %}"
    "{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "filters": LOOP % (LOOP % "{{ 'a' | upper | lower }}"),
}


@pytest.mark.parametrize("source", LONG.values(), ids=LONG.keys())
def test_steps_are_counted(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_limits, "MOST_STEPS", 2000)
    with pytest.raises(ValueError, match="got Exceeded: more than 2000 loop turns"):
        render(source)


def test_time_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.02)
    begun = time.thread_time()
    with pytest.raises(ValueError, match="got Exceeded: more than 0.02 seconds"):
        render(LOOP % (LOOP % "{% set x = i %}"))
    assert time.thread_time() - begun < 1


LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [1] * 10**10 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{x:{w}}'.format_map({'x': 1, 'w': 10**9}) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ 'a' | indent(10**9, true) }}",
    "{{ range(99) | map('string') | join('a' * 999999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 9999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 9999) }}",
    *(
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = "
        f"{made} %}}{{% endfor %}}"
        for made in ("n.x + n.x", "n.x ~ n.x", "n.x * 2", "n.x.replace('b', n.x)")
    ),
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "{% set x %}{% for i in range(9999) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}",
    "{% for i in range(9999) %}{{ 'a' * 10000 }}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "a" * 100_001,
]


@pytest.mark.parametrize("source", LARGE)
def test_nothing_large_is_made(source: str):
    begun = time.thread_time()
    with pytest.raises(
        ValueError, match=r"template accepts, got Exceeded: an? |got Exceeded: text"
    ):
        render(source)
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ [][3] + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x'.encode('ascii').decode('x') }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ strftime_now(3) }}",
        "{{ messages | sum }}",
        "{{ 'a' | truncate(-5) }}",
        "{{ 'é'.encode('ascii') }}",
        "{{ lipsum() }}",
    ],
)
def test_no_error_of_a_template_is_raw(source: str):
    with pytest.raises(ValueError, match=r"^expected messages that .* accepts, got \w+: "):
        render(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content.split('</think>')[-1] | trim }}", "there"),
        ("{{ '%s %5d' % ('a', messages[0].id) }}", "a 1700000000"),
        ("{{ '{} {:>4}'.format(messages[0].id, 7) }}", "1700000000    7"),
        ("{% macro f(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ f(10**12) }}", "1000000000000-2"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('id', 'eq', 1700000000) | list | length }}", "1"),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }} {% endfor %}", "0False 1True "),
        ("{% for m in messages %}{{ loop.length }}"
         "{{ loop.nextitem is defined }}{% endfor %}", "2True2False"),
        ("{% for k, v in messages[1].items() %}{{ k ~ '=' ~ v }};{% endfor %}",
         "role=assistant;content=yes;"),
        ("{% for m in messages if m.id %}{{ m.id }}{% else %}none{% endfor %}", "1700000000"),
        ("{% for m in messages if m.role == 'x' %}{% else %}none{% endfor %}", "none"),
        ("{{ messages[::-1][0].role ~ none ~ 3 }}", "assistantNone3"),
        ("{{ 1 + 2.5 * 2 ** 3 % 7 }}{{ [1] + [2] }}{{ -3 * -2 }}", "7.0[1, 2]6"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{{ 'a' * 3 }}{{ messages | tojson | length > 50 }}", "aaaTrue"),
    ],
)  # fmt: skip
def test_what_templates_do_they_may_do(source: str, expected: str):
    assert render(source) == expected


def test_a_long_conversation_is_within_the_limits():
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim + '\n' }}{% endfor %}"
    conversation = [{"role": "user", "content": "x" * 2000}] * 1000
    text = chat_template.render(source, conversation, bos_token="", eos_token="")
    assert len(text) == 1000 * 2007


def test_weights():
    shared: list[Any] = ["ab"]
    for _ in range(100):
        shared = [shared, shared]
    looped: list[Any] = []
    looped.append(looped)
    assert weight("abc") == 3 and weight({"a": "bcd"}) == 2 + 3 + 5
    assert weight(shared) > 2**100 and weight(looped) < 20
    assert weight(10**9, True) == weight("%1000000000d", True) == 10**9 and weight(10**9) == 30
