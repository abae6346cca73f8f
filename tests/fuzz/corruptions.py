"""Corrupted inputs, each made from a seed and a number alone: bytes, JSON of other types, chat
templates, GGUF's parts.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from .models import Parts, Raw, directories, gguf_files

Files = dict[str, bytes]
"""The contents of a model's files by name; a GGUF file is alone."""

DEEP, LONG = "@deep@", "@long@"
WRITTEN = {DEEP: "[" * 100_000 + "]" * 100_000, LONG: "9" * 5000}
"""Values that no Python value writes as JSON."""
SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), DEEP, LONG),
    *(10**3, 10**6, 10**9, 2**31, 2**32 - 1, 2**63, 10**18, 10**30, -(10**9)),
    *("", "x", "2", "</s>", "\ud800", "\0", "a" * 50_000, "../x", "é" * 300),
    *([], {}, [[]], [None], {"a": {}}, ["x"] * 3, [2**32], {"type": "x"}, [[0, 1], [2]]),
]
TEMPLATES = [
    "{{ 'a' * 10**10 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}"
    "{{ n.x }}{{ n.x | tojson }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ 10 ** 10 ** 10 }}",
    "{% set n = namespace(x='a' * 900) %}{% for i in range(9) %}"
    "{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
    "{{ range(99999) | list | map('string') | join('a' * 99999) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}",
    "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + ['a' * 1000000 ~ i] %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ [][3] + messages.x.y }}",
    "{{ '\ud800' }}",
    "{{ messages[0].content.encode('ascii').decode('x') }}",
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "(" * 5000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "[" * 150 + "]" * 150 + " }}",
    "{% include 'x' %}{% import 'y' as z %}",
    "{{ strftime_now(3) }}{{ strftime_now('%' * 100000) }}",
    "{{ {}['x'].y }}",
    "{{ messages | sum }}",
    "{{ raise_exception() }}",
    "{% set x = messages.append(1) %}",
    "{{ lipsum(n=100000) }}",
    "{{ 'x' | format(*range(9999)) }}",
    "{{ messages | tojson | truncate(-5) | wordwrap(0) }}",
]


def build(seed: int, number: int) -> tuple[str, Files]:
    """The corrupted input of this number: in words what was done, and the files."""
    rng = random.Random(f"{seed}-{number}")
    if rng.random() < 0.45:
        parts = copy.deepcopy(rng.choice(gguf_files()))
        if rng.random() < 0.25:
            told, content = _binary(rng, parts.joined())
            return f"GGUF: {told}", {"model.gguf": content}
        told = "; ".join(_gguf(rng, parts) for _ in range(rng.choice((1, 1, 2))))
        return f"GGUF: {told}", {"model.gguf": parts.joined()}
    files = dict(rng.choice(directories()))
    told = "; ".join(_directory(rng, files) for _ in range(rng.choice((1, 1, 2))))
    return told, files


def _directory(rng: random.Random, files: Files) -> str:
    if rng.random() < 0.1:
        return _template(rng, files)
    if rng.random() < 0.03:
        name = rng.choice(sorted(files))
        del files[name]
        return f"{name}: removed"
    texts = [name for name in files if name.endswith(".json")]
    name = rng.choice(texts) if rng.random() < 0.75 else rng.choice(sorted(files))
    if name in texts and rng.random() < 0.85:
        told, files[name] = _json(rng, name, files[name])
    else:
        told, files[name] = _binary(rng, files[name])
    return f"{name}: {told}"


def _template(rng: random.Random, files: Files) -> str:
    source = rng.choice(TEMPLATES)
    files["chat_template.jinja"] = source.encode("utf-8", "surrogatepass")
    return f"chat_template.jinja: {source[:60]}"


def _binary(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Flipped, lost, repeated, overwritten bytes; most of them in front, where the headers are."""
    size = len(content)
    first = rng.randrange(min(size, 4096) if rng.random() < 0.7 else size) if size else 0
    length = rng.choice((1, 1, 2, 8, 100))
    kind = rng.choice(("flip", "cut", "drop", "repeat", "zeros", "ones"))
    if kind == "flip":
        changed = bytearray(content)
        for place in range(first, min(first + length, size)):
            changed[place] ^= 1 << rng.randrange(8)
        return f"{length} bits flipped from {first}", bytes(changed)
    if kind == "cut":
        return f"cut at {first}", content[:first]
    middle = {"drop": b"", "repeat": content[first : first + length] * 2}
    fill = bytes([255 * (kind == "ones")]) * length
    put = middle.get(kind, fill)
    return f"{kind} {length} bytes at {first}", content[:first] + put + content[first + length :]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a document; of long lists and tables a few."""
    found = [path]
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in list(entries)[:40]:
            found += _places(child, (*path, key))
    return found


AIMED: dict[str, list[tuple[str, Any]]] = {
    "tokenizer.json": [
        ("padding", {**dict.fromkeys(("direction",), "Left"), "strategy": {"Fixed": 10**9},
         "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "<|im_end|>"}),
        ("padding", {"direction": "Left", "strategy": {"Fixed": 64}, "pad_to_multiple_of": 10**12,
         "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}),
        ("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst",
         "stride": 10**9}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|a)*$("},
         "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "Strip", "content": " ", "start": 10**9, "stop": 10**18}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAAAA=="}),
        ("model", {"type": "WordLevel", "vocab": {"a": 4294967295, "b": 0}, "unk_token": "c"}),
        ("model", {"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 1e308]]}),
        ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [],
         "special_tokens": {}}),
    ],
}  # fmt: skip


def _json(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    """An entry of another type, exchanged, doubled, renamed or lost."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # of a file that was corrupted before
        return _binary(rng, content)
    if rng.random() < 0.15 and name in AIMED and isinstance(document, dict):
        key, value = rng.choice(AIMED[name])
        document[key] = value
        return f"{key} = {value!r:.60}", json.dumps(document).encode()
    places = _places(document)
    place = rng.choice(places)
    if not place:
        document, told = rng.choice(SCALARS), "all of it"
    else:
        owner = document
        for key in place[:-1]:
            owner = owner[key]
        told = _changed(rng, owner, place[-1], document)
    text = json.dumps(document)
    for mark, written in WRITTEN.items():
        text = text.replace(f'"{mark}"', written)
    return f"{'.'.join(map(str, place))} {told}", text.encode()


def _changed(rng: random.Random, owner: Any, key: Any, document: Any) -> str:
    kind = rng.choice(("set", "set", "set", "set", "remove", "rename", "scale", "nest"))
    if kind == "remove":
        del owner[key]
        return "removed"
    if kind == "rename" and isinstance(owner, dict):
        owner[str(key) + "x"] = owner.pop(key)
        return "renamed"
    if kind == "scale" and isinstance(owner[key], int | float):
        factor = rng.choice((-1, 0, 2, 10, 1000, 10**6))
        owner[key] *= factor
        return f"times {factor}"
    if kind == "nest":
        owner[key] = copy.deepcopy(document)
        return "= the whole document"
    owner[key] = rng.choice(SCALARS)
    return f"= {owner[key]!r:.40}"


def _gguf(rng: random.Random, parts: Parts) -> str:
    act: Callable[[random.Random, Parts], str] = rng.choice((_entry, _entry, _entry, _tensor))
    return act(rng, parts)


NUMBERS = [0, 1, 2, 3, 5, 2**16, 10**6, 2**31, 2**32 - 1]
RAW = [
    Raw(b"\x09\0\0\0\x04\0\0\0" + b"\xff" * 8),  # a list of 2^64 numbers
    Raw(b"\x08\0\0\0" + b"\xff" * 7 + b"\x7f"),  # a text of 2^63 bytes
    Raw(b"\x09\0\0\0\x08\0\0\0" + (10**6).to_bytes(8, "little") + bytes(8) * 10**6),
    Raw(b"\x0a\0\0\0" + b"\xff" * 8),
    Raw(b"\x0c\0\0\0" + b"\xff" * 8),
    Raw(b"\x08\0\0\0" + (4).to_bytes(8, "little") + b"\xff\xfe\xed\xa0"),
    Raw(b"\x63\0\0\0"),
    Raw(b"\x09\0\0\0\x09\0\0\0" + (1).to_bytes(8, "little") + b"\x04\0\0\0"),
]


def _entry(rng: random.Random, parts: Parts) -> str:
    place = rng.randrange(len(parts.metadata))
    key, value = parts.metadata[place]
    kind = rng.choice(("set", "set", "set", "remove", "double", "item", "template"))
    if kind == "remove":
        del parts.metadata[place]
        return f"{key} removed"
    if kind == "double":
        parts.metadata.append((key, rng.choice(NUMBERS)))
        return f"{key} twice"
    if kind == "template":
        source = rng.choice(TEMPLATES)
        parts.metadata.append(("tokenizer.chat_template", source))
        return f"template {source[:60]}"
    if kind == "item" and isinstance(value, list):
        value = list(value)
        new = rng.choice([*NUMBERS, "", "x", "a" * 100_000, 0.5, float("nan"), value[0]])
        if type(new) is type(value[0]):
            value[rng.randrange(len(value))] = new
        else:
            value = [new] * len(value)
        parts.metadata[place] = key, value
        return f"{key}: an item {new!r:.30}"
    texts = ["", "x", "llama", "gpt2", "a" * 100_000, "\0"]
    lists = [[], [1], ["a"] * 96, [0.5], [1] * 2, [True]]
    new = rng.choice(
        [*NUMBERS, *NUMBERS, *RAW, True, float("nan"), float("inf"), 0.0, *texts, *lists]
    )
    parts.metadata[place] = key, new
    return f"{key} = {new!r:.40}"


def _tensor(rng: random.Random, parts: Parts) -> str:
    place = rng.randrange(len(parts.tensors))
    name, shape, kind, offset = parts.tensors[place]
    what = rng.choice(("shape", "kind", "offset", "name", "remove", "many", "rank", "data"))
    if what == "remove":
        del parts.tensors[place]
    elif what == "many":
        whole = (len(parts.data) // 34 * 32,)
        parts.tensors += [(f"more.{n}", whole, 8, 0) for n in range(500)]
    elif what == "data":
        first = offset % max(len(parts.data), 1)
        parts.data = parts.data[:first] + b"\xff" * 64 + parts.data[first + 64 :]
    else:
        axis = rng.randrange(len(shape))
        sizes = [*NUMBERS, 2**63, 32, 256]
        resized = (*shape[:axis], rng.choice(sizes), *shape[axis + 1 :])
        parts.tensors[place] = (
            rng.choice(("", "x", "blk.0.attn_q.weight", "rope_freqs.weight", "a" * 70_000))
            if what == "name"
            else name,
            resized
            if what == "shape"
            else shape * rng.randrange(1, 4)
            if what == "rank"
            else shape,
            rng.randrange(45) if what == "kind" else kind,
            rng.choice((1, 32, 10**9, 2**63, 2**64 - 1)) if what == "offset" else offset,
        )
    return f"tensor {name}: {what}"
