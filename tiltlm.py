"""tiltlm: decoding a language model is probabilistic inference.

    import tiltlm                   # checks that the five packages are tiltlm's own
    tiltlm.__version__
    tiltlm.ppl, tiltlm.samplers, tiltlm.amortized, tiltlm.models, tiltlm.experiments

The packages are imported by their own names too, `from samplers import smc`; a folder of that name
beside a notebook would be taken in their place, which this import finds out.
"""

from __future__ import annotations

import importlib
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

__version__ = metadata.version("tiltlm")
PACKAGES = ("ppl", "samplers", "amortized", "models", "experiments")


def _check_own(name: str) -> None:
    """Raise ImportError if another file would be imported under the name of a package."""
    spec, own = util.find_spec(name), Path(__file__).parent / name / "__init__.py"
    found = "nothing" if spec is None else spec.origin or str(spec.submodule_search_locations)
    if spec is None or spec.origin is None or not own.samefile(spec.origin):
        raise ImportError(
            f"expected {name} to be tiltlm's, {own}, got {found}; rename what is there, or start"
            " Python in another folder"
        )


def __getattr__(name: str) -> ModuleType:
    if name in PACKAGES:
        return importlib.import_module(name)
    raise AttributeError(f"module 'tiltlm' has no attribute {name!r}; it has {', '.join(PACKAGES)}")


for _name in PACKAGES:
    _check_own(_name)
