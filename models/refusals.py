"""What a damaged file does to its reader becomes one error, which names the file.

Files are read by many hands: Python's JSON, packages in Rust that panic, arithmetic on sizes that a
file announces.  None of them knows the file's name, and each fails in its own way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

LONGEST = 20_000
"""Characters of a message; of longer ones, which repeat what a file holds, the middle is cut."""
LONGEST_FOREIGN = 500


@contextlib.contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """A block that reads `what` from the file (or directory) `path`.

    Of the errors within, those of the house ("expected ...") are passed on, after the file's name
    where they do not have it; so are errors of the system, of imports, and interrupts.

    Raises:
        ValueError: in the place of all others.
    """
    try:
        yield
    except (OSError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a package in Rust is no Exception
        text = str(error)
        if isinstance(error, ValueError) and "expected" in text:
            if str(path) in text and len(text) <= LONGEST:
                raise
            named = text if str(path) in text else f"{path}: {text}"
            raise ValueError(shortened(named, LONGEST)) from error
        got = f"{type(error).__name__}: {text}" if text else type(error).__name__
        got = shortened(got)
        raise ValueError(f"{path}: expected {what}, got {got}; fetch the file again") from error


def shortened(text: str, most: int = LONGEST_FOREIGN) -> str:
    """Its beginning and its end, if it is longer than `most`."""
    return text if len(text) <= most else f"{text[: most // 4]} ... {text[-(most // 4) :]}"
