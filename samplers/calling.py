"""What every public sampler does around its work: checks how it is called, and says what Python
functions of the user did wrong.
"""

from __future__ import annotations

import contextvars
import difflib
import functools
import inspect
import logging
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from ppl.canvas import check_canvas
from ppl.checks import check_key
from ppl.failures import interruptible, said_once
from ppl.scorers import host_functions, takes_log_odds
from ppl.target import check_target

from .base import check_threshold

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger(__name__)

_inside = contextvars.ContextVar("inside of another sampler", default=False)
TARGETS = ("target", "p")
"""What samplers call the target that they are given."""


def public(function: F) -> F:
    """Decorator of a sampler that users call.

    Its option that there is not is named after it, not after what it hands its options to; its
    `key` is a key, its `target` a target and its `threshold` a number; what Python functions in its
    arguments did wrong is said once, when it has run (`ppl.failures`).

    Raises (the decorated function):
        TypeError: for an option that it does not have.
        ValueError: for a key, a target or a threshold that is none.
    """
    names = list(inspect.signature(function).parameters)
    place, name = next(((i, name) for i, name in enumerate(names) if name in TARGETS), (0, ""))
    of_canvases = "CanvasTarget" in str(function.__annotations__.get(name))
    check = check_canvas if of_canvases else check_target

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        _check_options(function, kwargs)
        if names[:1] == ["key"] and ("key" in kwargs or args):
            check_key(kwargs["key"] if "key" in kwargs else args[0])
        if kwargs.get("threshold") is not None:
            check_threshold(kwargs["threshold"])
        if name in kwargs:
            check(kwargs[name])
        elif name and place < len(args):
            check(args[place])
        return watched(function, (args, kwargs), *args, **kwargs)

    return called  # pyright: ignore[reportReturnType]


def watched(function: Callable[..., Any], held: Any, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), and what went wrong in the scores that the pytree `held` holds."""
    functions, inner = host_functions(held), _inside.get()
    token = _inside.set(True)
    try:
        with said_once(functions), interruptible():
            out = function(*args, **kwargs)
            if functions and not isinstance(out, types.GeneratorType):
                jax.block_until_ready(out)
    finally:
        _inside.reset(token)
    if takes_log_odds(held) and not inner:
        _say_invalid(out)
    return out


def heeding(held: Any, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), a program; waited for if `held` has Python functions of users, so that an
    interrupt in one of them is heard here.
    """
    if not host_functions(held):
        return function(*args)
    with interruptible():
        return jax.block_until_ready(function(*args))


def _say_invalid(out: Any) -> None:
    """That rewards were outside [0, 1]: a sampler only knows that they killed."""
    invalid = getattr(out, "num_invalid", getattr(getattr(out, "info", None), "invalid", None))
    if invalid is None or isinstance(invalid, Tracer) or not np.any(np.asarray(invalid)):
        return
    log.warning(
        "%d strings got weight 0 because a factor was NaN or +inf: a reward outside [0, 1] that is"
        " given to ppl.log_odds is NaN.  Give scores on another scale to ppl.reward or"
        " ppl.step_scores as they are.",
        int(np.asarray(invalid).sum()),
    )


def _check_options(function: Callable[..., Any], given: dict[str, Any]) -> None:
    if not given or _options(function) is None:
        return
    known = _options(function) or ()
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?  " if close else ""
            raise TypeError(
                f"{called_name(function)}() got an unexpected option {name!r}; {hint}it takes"
                f" {', '.join(known)}"
            )


@functools.cache
def _options(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names that a function takes, those of its `**options: Unpack[...]` too; None: any."""
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.append(parameter.name)
            continue
        stub = types.SimpleNamespace(__annotations__={"options": parameter.annotation})
        hint = typing.get_type_hints(stub, getattr(inspect.unwrap(function), "__globals__", {}))
        options: Any = next(iter(typing.get_args(hint["options"])), None)
        if not typing.is_typeddict(options):
            return None
        names += sorted(options.__required_keys__ | options.__optional_keys__)
    return tuple(names)


def called_name(function: Callable[..., Any]) -> str:
    """What users call it by: "smc.run", "suffix.kernel"."""
    module = function.__module__.rpartition(".")[2]
    return f"{'smc' if module == 'sequential' else module}.{function.__qualname__}"
