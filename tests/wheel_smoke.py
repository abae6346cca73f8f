"""Run by `make wheel` with the installed wheel, from an empty directory: every package imports, one
thing works, and the command `tiltlm` is `python -m experiments.decode`.
"""

import importlib
import importlib.metadata
import subprocess
import sys
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

command = str(Path(sys.executable).with_name("tiltlm"))
module = [sys.executable, "-I", "-m", "experiments.decode"]
for argument in ("--help", "--model=nowhere"):
    said = [
        subprocess.run([*way, "--prompt=a", argument], capture_output=True, text=True, check=False)
        for way in ([command], module)
    ]
    status = {(done.returncode, done.stdout, done.stderr) for done in said}
    if len(status) != 1 or said[0].returncode != (0 if argument == "--help" else 2):
        raise SystemExit(f"expected {command} to do what the module does, got {said}")
print("the wheel works")
