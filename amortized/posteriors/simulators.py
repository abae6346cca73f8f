"""A NumPyro model as a simulator: latents on the unconstrained space R^D, and what they generate.

    def model():
        theta = numpyro.sample("theta", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(theta, 0.3).to_event(1))

    s = simulators.simulator(model, latents=["theta"], observed=["x"])
    theta, x = s.draws(key, 1000)    # theta [1000, D], x {"x": [1000, 2]}

What is observed is named, not fixed, and need not have a density that anybody knows.  The bijection
of every site's support to R^D is part of the simulator, so that no network ever proposes what the
prior excludes.  Latents with a finite support are named apart, and stand behind the others as the
numbers of their values:

    s = simulators.simulator(model, latents=["theta"], discrete=["kind"], observed=["x"])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import compute_log_probs, constrain_fn
from paramax import unwrap

from ppl.showing import shown

from .sites import Discrete, Site, support

Observation = dict[str, Array]
"""The observed sites by name."""


@shown
class Simulations(NamedTuple):
    """N draws of a model: latents on R^D, and the observed sites [N, ...]."""

    theta: Float[Array, "N D"]
    x: Observation

    @property
    def finite(self) -> Bool[Array, " N"]:
        """Which of them have no NaN and nothing infinite."""
        leaves = [leaf for leaf in jax.tree.leaves(self) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        rows = [jnp.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
        return functools.reduce(jnp.logical_and, rows)


class Simulator(eqx.Module):
    """A NumPyro model whose latent and observed sites are named (`simulator`).

    Attributes:
        model: the function.
        args, kwargs: what it is called with; arrays in them are arguments of every program.
        latents: the continuous sites that are inferred, in the order of their names, as they are on
            R^D.
        discrete: the sites of finite support that are inferred, in the order of their names; a
            position has the numbers of their values behind the coordinates of the others.
        observed: the sites that are seen.
        nuisance: the names of the latent sites that are neither.
    """

    model: Callable[..., Any] = eqx.field(static=True)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    latents: tuple[Site, ...] = eqx.field(static=True)
    discrete: tuple[Discrete, ...] = eqx.field(static=True)
    observed: tuple[Site, ...] = eqx.field(static=True)
    nuisance: tuple[str, ...] = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """D, the length of a position."""
        return sum(site.size for site in self.inferred)

    @property
    def inferred(self) -> tuple[Site | Discrete, ...]:
        """All sites that are inferred, as a position has them."""
        return (*self.latents, *self.discrete)

    @property
    def num_values(self) -> tuple[int, ...]:
        """How many values each discrete coordinate has, the last of a position."""
        return tuple(len(site.values) for site in self.discrete for _ in range(site.size))

    def draw(self, key: PRNGKeyArray) -> tuple[Float[Array, " D"], Observation]:
        """One draw of prior and simulator."""
        sites = _sample_sites(self.run, key)
        return self.position(sites), {s.name: sites[s.name]["value"] for s in self.observed}

    def draws(self, key: PRNGKeyArray, num: int) -> Simulations:
        """`num` independent ones, compiled; the first are those of a smaller number."""
        return Simulations(*_draws(self, jax.random.split(key, num)))

    def simulate(self, key: PRNGKeyArray, theta: Float[Array, " D"]) -> Observation:
        """The observed sites of one run at a position on R^D."""
        values = self.constrain(theta)
        sites = _sample_sites(handlers.substitute(self.run, values), key)
        return {site.name: sites[site.name]["value"] for site in self.observed}

    def constrain(self, theta: Float[Array, " D"]) -> dict[str, Array]:
        """A position on R^D as the latent sites in their own supports."""
        # The model runs to its end, and jit leaves out what is not needed.
        z, values = self._split(theta)
        run = handlers.seed(handlers.substitute(self.run, values), jax.random.key(0))
        return constrain_fn(run, (), {}, z) | values

    def unconstrain(self, sites: Mapping[str, Any]) -> Float[Array, " D"]:
        """The position of latent sites; supports may depend on earlier ones."""
        return self.position(self._given(sites))

    def log_jacobian(self, theta: Float[Array, " D"]) -> Float[Array, ""]:
        """log |d sites / d theta|."""
        return self._log_jacobian(self._split(theta)[0], self._given(self.constrain(theta)))

    def log_prior(self, theta: Float[Array, " D"]) -> Float[Array, ""]:
        """log density of the prior on R^D, Jacobian included.

        Raises:
            ValueError: if the model has latent sites that are not inferred.
        """
        self.check_no_nuisance()
        found = self._given(self.constrain(theta))
        names = [site.name for site in self.inferred]
        total = _total(found[name]["fn"].log_prob(found[name]["value"]) for name in names)
        return total + self._log_jacobian(self._split(theta)[0], found)

    def log_likelihood(self, theta: Float[Array, " D"], x: Observation) -> Float[Array, ""]:
        """log density of the observed sites given the latents.

        Raises:
            ValueError: if the model has latent sites that are not inferred: their integral is not
                known.
            NotImplementedError: from a site that has no density.
        """
        self.check_no_nuisance()
        values = self.constrain(theta) | x
        run = handlers.seed(handlers.condition(self.run, dict(x)), jax.random.key(0))
        log_probs, _ = compute_log_probs(run, (), {}, values)
        latent = {site.name for site in self.inferred}
        return _total(value for name, value in log_probs.items() if name not in latent)

    def observation(self, x: Any) -> Observation:
        """Observed sites by name and in their types, from a dict or, of a single site, an array.

        Raises:
            ValueError: if a site is missing, unknown, of another shape, or not finite.
        """
        names = [site.name for site in self.observed]
        if not isinstance(x, Mapping):
            if len(names) > 1:
                raise ValueError(
                    f"expected a dict with the observed sites {names}, got {type(x).__name__}"
                )
            x = {names[0]: x}
        if set(x) != set(names):
            raise ValueError(f"expected the observed sites {names}, got {sorted(x)}")
        return {site.name: _checked(site, x[site.name]) for site in self.observed}

    def run(self) -> Any:
        """The model with its arguments."""
        args, kwargs = unwrap((self.args, self.kwargs))
        return self.model(*args, **kwargs)

    def _given(self, sites: Mapping[str, Any]) -> dict[str, Any]:
        """The model's sites where the latents have these values."""
        values = {site.name: jnp.asarray(sites[site.name]) for site in self.inferred}
        return _sample_sites(handlers.substitute(self.run, values), jax.random.key(0))

    def _log_jacobian(self, position: dict[str, Array], found: dict[str, Any]) -> Array:
        return _total(
            biject_to(found[name]["fn"].support).log_abs_det_jacobian(z, found[name]["value"])
            for name, z in position.items()
        )

    def position(self, sites: Mapping[str, Any]) -> Float[Array, " D"]:
        """The position of the latents in a trace of the model."""
        each = [
            biject_to(sites[s.name]["fn"].support).inv(sites[s.name]["value"]) for s in self.latents
        ]
        each += [site.codes(sites[site.name]["value"]) for site in self.discrete]
        return jnp.concatenate([jnp.reshape(value, -1) for value in each])

    def _split(self, theta: Float[Array, " D"]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Continuous sites on R^D, and the discrete ones with their values."""
        ends = np.cumsum([site.size for site in self.inferred])[:-1]
        parts = dict(
            zip((site.name for site in self.inferred), jnp.split(theta, ends), strict=True)
        )
        return (
            {site.name: parts[site.name].reshape(site.shape) for site in self.latents},
            {site.name: site.decoded(parts[site.name]) for site in self.discrete},
        )

    def check_no_nuisance(self) -> None:
        """Raise ValueError if there are latent sites that are not inferred."""
        if self.nuisance:
            raise ValueError(
                f"expected a model with the latent sites {[s.name for s in self.inferred]} alone,"
                f" got {list(self.nuisance)} besides, over which the density would have to be"
                " summed; name them among `latents` or `discrete`, or sum them out in the model"
            )


def simulator(
    model: Callable[..., Any],
    *,
    latents: Sequence[str],
    observed: Sequence[str],
    discrete: Sequence[str] = (),
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Simulator:
    """A NumPyro model as a simulator.

    Latent sites that are not named are nuisance: they are drawn, and a posterior network sums over
    them without being told.

    Args:
        model: a NumPyro model; its sites have the same shapes in every run.
        latents: names of the continuous sites that are inferred; none if there are discrete ones.
        observed: names of the sites that are seen, of any type; not fixed by `obs=`.
        discrete: names of the sites of finite support that are inferred: Bernoulli, Categorical,
            DiscreteUniform, and what else has `enumerate_support`.
        args, kwargs: what the model is called with.

    Raises:
        ValueError: if a site does not exist, is named twice, has its value (or a factor) from the
            model itself, if a latent is discrete, or a discrete site has no support that is finite
            and known.
    """
    if not callable(model):
        raise ValueError(f"expected model to be a NumPyro model, a function, got {model!r}")
    args, kwargs = tuple(args), dict(kwargs or {})
    sites: dict[str, Any] = {}
    values: dict[str, tuple[int | float, ...]] = {}

    def look(key: PRNGKeyArray) -> dict[str, Array]:
        found = _sample_sites(functools.partial(model, *args, **kwargs), key)
        sites.update(found)
        # Here, for what its support depends on is known only while the model is traced.
        values.update({name: support(found[name]["fn"]) for name in discrete if name in found})
        return {
            name: biject_to(site["fn"].support).inv(site["value"])
            if name in latents
            else site["value"]
            for name, site in found.items()
            if name not in latents or not site["fn"].support.is_discrete
        }

    shapes = jax.eval_shape(look, jax.random.key(0))
    _check_names(sites, {"latents": latents, "observed": observed, "discrete": discrete})
    _check_kinds(sites, values, latents)

    def described(names: Sequence[str]) -> tuple[Site, ...]:
        return tuple(
            Site(name, tuple(shapes[name].shape), str(shapes[name].dtype)) for name in sorted(names)
        )

    finite = tuple(Discrete(*site, values[site.name]) for site in described(discrete))
    named = {*latents, *observed, *discrete}
    rest = [name for name, site in sites.items() if name not in named and not site["is_observed"]]
    parts = described(latents), finite, described(observed), tuple(rest)
    return Simulator(model, args, kwargs, *parts)


def conditioned(
    of: Simulator, log_likelihood: Callable[[Float[Array, " D"]], Float[Array, ""]]
) -> Callable[[], dict[str, Array]]:
    """The prior of a simulator's latent sites times a likelihood that is a function of them on R^D:
    a NumPyro model without arguments, which returns the sites.
    """
    of.check_no_nuisance()
    seen = {site.name: jnp.zeros(site.shape, site.dtype) for site in of.observed}

    def model() -> dict[str, Array]:
        # What is observed has a value of no account and is not seen; jit leaves it out.
        run = handlers.block(handlers.substitute(of.run, seen), hide=list(seen))
        sites = handlers.trace(run).get_trace()
        numpyro.factor("log_likelihood", log_likelihood(of.position(sites)))
        return {site.name: sites[site.name]["value"] for site in of.latents}

    return model


def _check_names(sites: dict[str, Any], asked: dict[str, Sequence[str]]) -> None:
    for what, names in asked.items():
        needless = what == "discrete" or (what == "latents" and asked["discrete"])
        if isinstance(names, str) or not (names or needless):
            raise ValueError(f'expected {what} as names of sites, ["theta"] say, got {names!r}')
        if missing := [name for name in names if name not in sites]:
            raise ValueError(
                f"expected {what} among the model's sites {sorted(sites)}, got {missing}"
            )
    named = [name for names in asked.values() for name in names]
    if len(set(named)) < len(named):
        twice = sorted({name for name in named if named.count(name) > 1})
        raise ValueError(f"expected every site to be named once, got {twice} more than once")
    if fixed := [name for name in named if sites[name]["is_observed"]]:
        raise ValueError(
            f"expected a model that draws the sites {fixed}, got one that fixes them; leave out"
            " `obs=`: what is observed is given to the posterior"
        )
    if fixed := [name for name, site in sites.items() if site["is_observed"] and name not in named]:
        raise ValueError(
            f"expected a model that draws all its sites, got {fixed} with values or factors of"
            " their own, which a simulation does not heed; draw them, and name them among"
            " `observed`"
        )


def _check_kinds(
    sites: dict[str, Any], values: dict[str, tuple[int | float, ...]], latents: Sequence[str]
) -> None:
    if discrete := [name for name in latents if sites[name]["fn"].support.is_discrete]:
        raise ValueError(
            f"expected continuous latents, got discrete {discrete}; a density on R^D has none: name"
            f" them apart, npe.training(..., discrete={discrete}), which gives them a categorical"
            " head beside the flow, sum them out in the model (dist.MixtureSameFamily), leave them"
            " as nuisance, or infer them by samplers"
        )
    if endless := [name for name, found in values.items() if not found]:
        raise ValueError(
            "expected discrete sites whose every entry has the same finitely many values, known"
            f" before the model runs (Bernoulli, Categorical, DiscreteUniform), got {endless};"
            " continuous sites are `latents`, and a count without bound may be cut by"
            " dist.Categorical over the values that matter"
        )


def _sample_sites(run: Callable[..., Any], key: PRNGKeyArray) -> dict[str, Any]:
    traced = handlers.trace(handlers.seed(run, key)).get_trace()
    return {name: site for name, site in traced.items() if site["type"] == "sample"}


def _total(values: Any) -> Float[Array, ""]:
    return functools.reduce(jnp.add, [jnp.sum(value) for value in values], jnp.float32(0))


@eqx.filter_jit
def _draws(simulator: Simulator, keys: Key[Array, " N"]) -> tuple[Array, Observation]:
    return jax.vmap(simulator.draw)(keys)


def _checked(site: Site, value: Any) -> Array:
    value = jnp.asarray(value)
    if value.shape != site.shape:
        raise ValueError(
            f"expected {site.name} of shape {list(site.shape)}, as the model draws it, got"
            f" {list(value.shape)}"
        )
    if not isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.inexact):
        # On the host: inside of jit too this is known.
        if num := int((~np.isfinite(np.asarray(value))).sum()):
            raise ValueError(
                f"expected finite values of {site.name}, got {num} that are NaN or infinite; a"
                " network cannot read them"
            )
    return value.astype(site.dtype)
