"""What is inferred: language models, targets, potentials, strings, exact enumeration and the
NumPyro bridge.
"""

from typing import TYPE_CHECKING, Any

from . import exact, testing, twists
from .any_order import AnyOrderFunctions, AnyOrderLM
from .automata import json_schema, regex
from .canonical import canonical
from .canvas import CanvasTarget
from .constraints import banned, forced, min_tokens, must_end, support
from .context_free import grammar
from .continuation import continuation
from .judge import judge
from .lm import LM, Features, LMFunctions, Prefix
from .next_scores import next_scores
from .potential import Potential, Product
from .pytrees import register_dataclass
from .rewards import reward, step_factors, step_scores
from .scorers import Scorer, log_odds, python
from .sequences import Sequences
from .space import Space
from .steps import Steps
from .table import table
from .target import Target, lm_potential
from .thinking import closed

if TYPE_CHECKING:
    from .text import Text

__all__ = [
    "AnyOrderFunctions",
    "AnyOrderLM",
    "CanvasTarget",
    "Features",
    "LM",
    "LMFunctions",
    "Potential",
    "Prefix",
    "Product",
    "Scorer",
    "Sequences",
    "Space",
    "Steps",
    "Target",
    "Text",
    "banned",
    "canonical",
    "closed",
    "continuation",
    "exact",
    "forced",
    "grammar",
    "json_schema",
    "judge",
    "lm_potential",
    "log_odds",
    "min_tokens",
    "must_end",
    "next_scores",
    "python",
    "regex",
    "register_dataclass",
    "reward",
    "step_factors",
    "step_scores",
    "support",
    "table",
    "testing",
    "twists",
]


def __getattr__(name: str) -> Any:
    """`Text` when it is first asked for: it needs numpyro, which takes longer to import than all
    the rest.
    """
    if name != "Text":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .text import Text

    return Text
