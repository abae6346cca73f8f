"""Language models: loading, the transformer decoder, tabular models, adapters for flax and equinox
models.
"""

from . import adapters, config, download, heads, lora, tabular, tokenizer, transformer
from .loading import load, load_lm

__all__ = [
    "adapters",
    "config",
    "download",
    "heads",
    "load",
    "load_lm",
    "lora",
    "tabular",
    "tokenizer",
    "transformer",
]
