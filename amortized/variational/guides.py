"""Guides: a normalizing flow over all latents of a model, and networks that map each datum to the
law of its own latent.

    guide = guides.AutoFlow(model, key)                         # global latents, any supports
    guide = guides.encoded(key, model, {"x": x}, site="z")      # a latent for each datum
    guide = numpyro.infer.autoguide.AutoIAFNormal(model)        # and NumPyro's own

A guide of both kinds of latents runs one after the other:

    whole = guides.AutoFlow(handlers.block(model, hide=["z"]), key)
    local = guides.encoded(key, model, {"x": x}, site="z")

    def guide(x):
        whole(x=x)
        local(x=x)

Densities are families of `amortized.posteriors.flows`, encoders `amortized.posteriors.summaries`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import (
    AffineTransform,
    IndependentTransform,
    ReshapeTransform,
    Transform,
)
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.initialization import init_to_median

from ppl.checks import check_key
from ppl.showing import shown

from ..posteriors import flows, summaries
from ..posteriors.simulators import Simulations
from .densities import Data, Program, samples


class Conditional(dist.Distribution):
    """A density of `flows` given contexts [*B, C], as NumPyro has distributions.

    Gradients pass through the contexts: flowjax's own wrapper stops them, and an encoder would
    never learn.
    """

    support = constraints.real_vector  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("density", "context")

    def __init__(self, density: AbstractDistribution, context: Float[Array, "*B C"]) -> None:
        self.density, self.context = density, context
        super().__init__(context.shape[:-1], density.shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Of a mixture, whose components are drawn, draws have no derivative."""
        return not isinstance(self.density, flows.Mixture)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """[*sample_shape, *B, D]."""
        return self.density.sample(key, sample_shape, self.context)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """[*sample_shape, *B]."""
        return self.density.log_prob(value, self.context)


class AutoFlow(AutoContinuous):
    """A flow, shifted and scaled, over all latents of a model on R^D, and in their own supports by
    bijections: one of NumPyro's automatic guides.

    Args:
        model: without local latents in minibatches (`encoded`).
        key: for the flow's start.
        flow: a family of `flows`; `flows.spline_coupling()` if None.
        prefix: of its sites.
    """

    def __init__(
        self,
        model: Program,
        key: PRNGKeyArray,
        *,
        flow: flows.Family | None = None,
        prefix: str = "auto",
    ) -> None:
        check_key(key)
        self._key, self._flow = key, flows.spline_coupling() if flow is None else flow
        super().__init__(model, prefix=prefix, init_loc_fn=init_to_median)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        # Once, and outside of jit: flows hold numbers of their own.
        self._density = self._flow(self._key, self.latent_dim, 0)

    def _get_posterior(self) -> dist.Distribution:
        density = eqx_module(f"{self.prefix}_flow", self._density)
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        ones = jnp.ones(self.latent_dim)
        scale = numpyro.param(
            f"{self.prefix}_scale", ones, constraint=constraints.softplus_positive
        )
        return moved(Conditional(density, jnp.zeros(0)), loc, scale)


class Encoder(eqx.Module):
    """What `encoded` trains: datum -> context, and the law of its latent on R^D given that.

    The law is a standard normal, or a flow, scaled and shifted by what the context says.
    """

    reads: summaries.Reads
    head: eqx.nn.Linear
    density: AbstractDistribution | None

    def __call__(self, batch: dict[str, Array]) -> dist.Distribution:
        context = jax.vmap(self.reads)(batch)
        loc, log_scale = jnp.split(jax.vmap(self.head)(context), 2, axis=-1)
        if self.density is None:
            return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
        return moved(Conditional(self.density, context), loc, jnp.exp(log_scale))


@shown
@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A guide of one local latent (`encoded`), called as the model is."""

    model: Program
    site: str
    encoder: Encoder
    transforms: tuple[Transform, ...]

    def __call__(self, **batch: Any) -> Array:
        encoder: Any = eqx_module(f"{self.site}_encoder", self.encoder)
        frame = self._frame(batch)
        with numpyro.plate(frame.name, frame.size, subsample_size=frame.rows, dim=frame.dim):
            law = encoder({name: jnp.asarray(rows) for name, rows in batch.items()})
            return jnp.asarray(
                numpyro.sample(self.site, dist.TransformedDistribution(law, [*self.transforms]))
            )

    def _frame(self, batch: dict[str, Any]) -> Frame:
        """The plate of the latent, as large as the model has it for this batch."""
        found: list[Frame] = []

        def look(key: PRNGKeyArray) -> None:
            with handlers.block():
                found.append(_located(_trace(key, self.model, batch), self.site))

        jax.eval_shape(look, jax.random.key(0))
        return found[0]


def encoded(
    key: PRNGKeyArray,
    model: Program,
    data: Data,
    *,
    site: str,
    flow: flows.Family | None = None,
    summary: summaries.Summary | None = None,
) -> Encoded:
    """A guide that maps each datum to the law of its own latent: q(z | x), in the latent's support.

    Its plate is the model's, whatever the batch: of the same size, and so of the same scale.

    Args:
        key: for the network's start.
        model: NumPyro's, called with the arrays as keyword arguments.
        data: arrays [N, ...], whose scales the encoder knows.
        site: the latent, continuous, in one plate of as many rows.
        flow: a family of `flows` given the context; a diagonal Gaussian if None.
        summary: how a datum is read, one of `summaries`; `summaries.mlp()` if None.

    Raises:
        ValueError: if there is no such latent, it is discrete, or it is not one for each row.
    """
    check_key(key)
    arrays = {name: jnp.asarray(rows) for name, rows in data.items()}
    reads_key, head_key, flow_key = jax.random.split(key, 3)
    traced = _trace(key, model, arrays)
    frame = _located(traced, site)
    fn = traced[site]["fn"]
    if fn.support.is_discrete or fn.batch_shape != (frame.rows,):
        raise ValueError(
            f"expected {site} continuous, one for each of the {frame.rows} rows, got the batch"
            f" shape {fn.batch_shape} and the support {fn.support}; end the law of one datum with"
            " .to_event(), and sum discrete latents out, or learn them by ReweightedWakeSleep"
        )
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.shape())[1:]
    dim = math.prod(shape)
    pilot = Simulations(jnp.zeros((len(next(iter(arrays.values()))), 0)), arrays)
    reads = (summaries.mlp() if summary is None else summary)(reads_key, pilot)
    size = summaries.size(reads, pilot)
    head = eqx.nn.Linear(size, 2 * dim, key=head_key)
    density = None if flow is None else flow(flow_key, dim, size)
    transforms = (ReshapeTransform(shape, (dim,)), transform)
    return Encoded(model, site, Encoder(reads, head, density), transforms)


def moved(law: dist.Distribution, loc: Any, scale: Any) -> dist.Distribution:
    """The law of loc + scale z, for z [D] of a law."""
    affine = IndependentTransform(AffineTransform(loc, scale), 1)
    return dist.TransformedDistribution(law, [affine])


@shown
class Frame(NamedTuple):
    """A plate, and how many rows of it there are."""

    name: str
    dim: int
    size: int
    rows: int


def _trace(key: PRNGKeyArray, model: Program, batch: Any) -> Any:
    return handlers.trace(handlers.seed(model, key)).get_trace(**batch)


def _located(trace: Any, site: str) -> Frame:
    """The one plate of a latent."""
    latents = [name for name, found in samples(trace).items() if not found["is_observed"]]
    frames = trace[site]["cond_indep_stack"] if site in latents else []
    if len(frames) != 1:
        raise ValueError(
            f"expected a latent {site!r} in one plate, that of the data, got the latents {latents}"
            f" and the plates {[frame.name for frame in frames]} of it"
        )
    [frame] = frames
    return Frame(frame.name, frame.dim, trace[frame.name]["args"][0], frame.size)
