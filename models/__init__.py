"""Language models: loading, the transformer decoder, tabular models, adapters for flax and equinox
models.
"""

from . import adapters, config, download, heads, lora, tabular, tokenizer, transformer
from .loading import load

__all__ = [
    "adapters",
    "config",
    "download",
    "heads",
    "load",
    "lora",
    "tabular",
    "tokenizer",
    "transformer",
]
