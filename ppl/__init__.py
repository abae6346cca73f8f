"""What is inferred: language models, targets, potentials, strings, exact enumeration and the NumPyro bridge."""

from . import exact, testing
from .automata import json_schema, regex
from .constraints import banned, forced, min_tokens, must_end
from .lm import LM, LMFunctions, Prefix
from .potential import Potential, Product
from .rewards import python, reward, step_scores
from .sequences import Sequences
from .steps import Steps
from .table import table
from .target import Target, lm_potential
from .text import Text

__all__ = [
    "LM",
    "LMFunctions",
    "Potential",
    "Prefix",
    "Product",
    "Sequences",
    "Steps",
    "Target",
    "Text",
    "banned",
    "exact",
    "forced",
    "json_schema",
    "lm_potential",
    "min_tokens",
    "must_end",
    "python",
    "regex",
    "reward",
    "step_scores",
    "table",
    "testing",
]
