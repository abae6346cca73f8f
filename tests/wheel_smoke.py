"""Run by `make wheel` with the installed wheel, from an empty directory: every package imports, and
one thing works.
"""

import importlib
import importlib.metadata
from pathlib import Path

import jax.numpy as jnp

for name in ("ppl", "samplers", "amortized", "models", "experiments"):
    folder = Path(importlib.import_module(name).__path__[0])
    if "site-packages" not in folder.parts or not (folder / "py.typed").exists():
        raise SystemExit(f"expected {name}, with py.typed, in site-packages; got {folder}")

if importlib.import_module("tiltlm").__version__ != importlib.metadata.version("tiltlm"):
    raise SystemExit("expected `import tiltlm` to give the version")

from ppl import rows  # noqa: E402

if rows.take_rows(jnp.arange(3), jnp.array([2, 2, 0])).tolist() != [2, 2, 0]:
    raise SystemExit("expected rows 2, 2, 0")
print("the wheel works")
