"""Language models: loading, the transformer decoder, tabular models, adapters for flax and equinox models."""

from .loading import load

__all__ = ["load"]
