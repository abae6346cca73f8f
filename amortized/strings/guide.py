"""Guides: language models of which a part is trained.

    g = guide.lora(key, base, rank=8)    # adapters; the base's weights are shared and frozen
    g = guide.full(model)                # all weights, for example of `transformer.random`
    g = guide.head(base)                 # the output matrix alone

`g.params` is what an optimiser sees; `dataclasses.replace(g, params=...)` is the guide after its
step.  `g.lm` is a language model like any other: it draws, it scores, and in a mixture with the
model it is a proposal:

    mixture([0.9, 0.1], [LanguageModel(target.under(g.lm)), locally_optimal])

Alone it is exact too, and if training has lost a part of the posterior no number of its own shows
it (`evidence.coverage` does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from models import heads, saving
from models import lora as adapters
from ppl.lm import LM
from ppl.pytrees import register_dataclass

FORMAT = "tiltlm-guide"
"""What the description of a guide's file says."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Guide:
    """A language model in two parts, lm = join(params, frozen); join is a module-level function.

    params: what is trained.  frozen: all else, shared with whatever it was made from.
    """

    params: PyTree
    frozen: PyTree
    join: Callable[[PyTree, PyTree], LM] = dataclasses.field(metadata={"static": True})

    @property
    def lm(self) -> LM:
        """The guide as a language model, differentiable in `params`; made of references, so it
        costs nothing.
        """
        return self.join(self.params, self.frozen)

    def merged(self) -> LM:
        """The guide as a language model of its own, adapters folded into the kernels: fastest to
        draw from.
        """
        lm = self.lm
        return adapters.merge(lm) if isinstance(self.params, adapters.Adapter) else lm

    def save(self, path: str | Path) -> None:
        """Write `params`: adapters as a directory in PEFT's layout (`models.lora.save`), others as
        one safetensors file, with what it belongs to, the shapes of what is frozen.
        """
        if isinstance(self.params, adapters.Adapter):
            adapters.save(path, self.lm, self.frozen)
        else:
            saving.save(path, self.params, {"format": FORMAT, **self._belongs_to()})

    def load(self, path: str | Path) -> Guide:
        """This guide with the parameters that `save` wrote; of adapters also those of PEFT,
        whatever their ranks and targets.

        Raises:
            FileNotFoundError: if there is nothing at the path.
            ValueError: if it is no guide's or is damaged, or is that of a guide of another model,
                of another kind, or with other shapes; of adapters as in `models.lora.load`.
        """
        if isinstance(self.params, adapters.Adapter):
            adapter, base = adapters.split(adapters.load(path, self.frozen))
            return dataclasses.replace(self, params=adapter, frozen=base)
        tensors, metadata = saving.read(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path}: expected a guide written by Guide.save, got a file without its"
                " description"
            )
        own = self._belongs_to()
        if metadata["frozen"] != own["frozen"]:
            raise ValueError(
                f"{path}: expected a guide on this model (fingerprint of its shapes"
                f" {own['frozen']}), got one on another ({metadata['frozen']}); load the model that"
                " it was trained on"
            )
        if metadata["kind"] != own["kind"]:
            raise ValueError(
                f"{path}: expected a guide of {own['kind']}, got one of {metadata['kind']}; make"
                " the guide as the one that was saved"
            )
        return dataclasses.replace(self, params=saving.fill(path, self.params, tensors))

    def _belongs_to(self) -> dict[str, str]:
        return {"frozen": saving.fingerprint(self.frozen), "kind": self.join.__name__}


def lora(
    key: PRNGKeyArray,
    lm: LM,
    *,
    rank: int = 8,
    alpha: float | int = 16.0,
    targets: Sequence[str] = adapters.TARGETS,
) -> Guide:
    """A decoder with fresh adapters, which alone are trained; `frozen` is the decoder, and the
    guide starts as it.

    Arguments and errors as in `models.lora.attach`.
    """
    adapter, base = adapters.split(
        adapters.attach(key, lm, rank=rank, alpha=alpha, targets=targets)
    )
    return Guide(adapter, base, adapters.join)


def full(lm: LM) -> Guide:
    """Any language model, all of whose parameters are trained.  They must be free to take any real
    value.

    (Tables and decoders are; a hidden Markov model's parameters are probabilities.)
    """
    # A copy, for a training loop may give the memory of its parameters away.
    return Guide(
        jax.tree.map(jnp.copy, lm.params), dataclasses.replace(lm, params=None), _with_params
    )


def head(lm: LM, start: Float[Array, "W D"] | dict[str, Array] | None = None) -> Guide:
    """A frozen decoder of which the output matrix is trained, from its own or from `start`
    (`models.heads`).

    Raises:
        ValueError: if the model is not a decoder, or `start` does not fit it.
    """
    start = jnp.copy(heads.own(lm)) if start is None else start
    heads.attach(start, lm)  # for its errors
    return Guide(start, lm, heads.attach)


def _with_params(params: PyTree, lm: LM) -> LM:
    return dataclasses.replace(lm, params=params)
