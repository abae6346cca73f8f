"""The process that loads corrupted inputs: `python -m tests.fuzz.child SEED FIRST LAST`.

It writes a line when it begins an input and one when it has ended it, so that its parent knows what
it was doing if it says no more.  Its address space is bounded, so that an exhausted memory is an
error here and not the machine's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import models
from tests.models.fixtures_io import builders

from .corruptions import Files, build

GIGABYTE = 1 << 30
SECONDS = 5.0
"""Of processor time, for an input."""
LONGEST = 21_000
"""Characters of a message that a person is to read."""
TAIL = 1500
"""Characters of a raw exception's traceback that are reported."""


def load_and_use(folder: Path) -> None:
    """What a user does first: load, write a prompt, read its tokens, and trace a step."""
    [*gguf] = folder.glob("*.gguf")
    lm, tokenizer = models.load(gguf[0] if gguf else folder)
    conversation = "the inn"
    tokenizer.encode(conversation)
    tokenizer.decode(range(0, tokenizer.vocab_size, 7))

    def step(params: Any, tokens: Any) -> Any:
        model = dataclasses.replace(lm, params=params)
        prefix = model.prefill(tokens)
        return model.step(prefix, model.init(prefix, 2, 3), jnp.zeros(2, jnp.int32))

    for way in (
        lambda: tokenizer.token_bytes,
        lambda: tokenizer.chat(conversation),
        lambda: jax.eval_shape(step, lm.params, jnp.zeros(3, jnp.int32)),
    ):
        try:
            way()
        except ValueError as error:  # of tokenizers without bytes, of templates, of a short context
            if "expected" not in str(error):
                raise


def outcome(folder: Path, files: Files) -> tuple[str, str]:
    """How loading these files ended, and in words why."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        load_and_use(folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        if isinstance(error.__cause__, MemoryError):
            return "memory", said[:TAIL]
        told = re.search("got|absent|does not exist", said)
        good = told and str(folder) in said and "expected" in said and len(said) <= LONGEST
        return ("refused", said[:200]) if good else ("raw", traceback.format_exc()[-TAIL:])
    except MemoryError:
        return "memory", traceback.format_exc()[-TAIL:]
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of Rust are no Exception
        return "raw", traceback.format_exc()[-TAIL:]
    return "loaded", ""


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound(more: int) -> None:
    """Refuse this process `more` bytes beyond those it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def main(seed: int, first: int, last: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        good = builders.directory(Path(folder) / "good", "smollm2")
        load_and_use(good)  # what is imported late
    print(json.dumps({"begun": None}), flush=True)
    resident = peak()
    if sys.platform == "linux":
        bound(3 * GIGABYTE)
    for number in range(first, last):
        told, files = build(seed, number)
        print(json.dumps({"begun": number, "told": told}), flush=True)
        # The system ends a process that has used up its seconds.
        most = math.ceil(time.process_time() + SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        with tempfile.TemporaryDirectory() as folder:
            kind, why = outcome(Path(folder), files)
        size = sum(map(len, files.values()))
        if peak() > resident + GIGABYTE + size:
            kind, why = "memory", f"{(peak() - resident) >> 20} MB beyond those before; {why}"
        print(json.dumps({"ended": number, "kind": kind, "why": why}), flush=True)
        if kind == "memory":
            return


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
