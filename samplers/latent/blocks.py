"""NumPyro models with text in them: chains that alternate moves of the continuous latents and moves
of the text.

A model with one latent text site x ~ gamma(x) (`ppl.Text`), continuous latents z and other factors
has the density

    pi(z, x) proportional to gamma(x) f(z, x)

with f the density of all other sites, latent and observed.

Given x, a blackjax algorithm (NUTS) moves z, in which no language model takes part.  Given z, a
text kernel (suffix moves, particle Gibbs) with the target gamma(x) f(z, x) moves x: f is a reward
at the end of the string.  Each of the blocks leaves pi invariant, and so do they in turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro import handlers

import ppl
from ppl.ancestral import ancestral
from ppl.checks import check_count
from ppl.potential import State as PotentialState
from ppl.pytrees import as_pytree, register_dataclass
from ppl.sequences import Sequences
from ppl.showing import shown
from ppl.target import Target

from ..base import Cost, Guarantee, Kernel, X, each_chain, holding
from ..mcmc import suffix
from ..registry import sampler
from ..strings import regeneration
from ..testing import sequences_of
from . import posterior
from .posterior import Density, LogDensity, join_static, split_static

LatentKernel = Callable[[LogDensity, int], blackjax.SamplingAlgorithm]
"""(log density of the latents given the text, D) -> a blackjax algorithm over R^D."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """C chains.

    position: [C, D] the latents on the unconstrained space.  text: the text kernel's state (before
    `init`, strings). latents: every latent and deterministic site by name [C, ...], on its
    constrained space.
    """

    position: Float[Array, "C D"]
    text: X
    latents: dict[str, Array]

    @property
    def sequences(self) -> Sequences:
        """The chains' strings."""
        return sequences_of(self.text)


@shown
class Info(NamedTuple):
    """What a step did: blackjax's info of the latents, leaves [C, ...], and the text kernel's."""

    latents: Any
    text: Any


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Joint:
    """A NumPyro model with a text site; made by `joint`.

    target: gamma, of the text alone.  arrays, static: the model's arguments.  text_site: its name.
    """

    target: Target
    arrays: tuple
    model: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    static: tuple = dataclasses.field(metadata={"static": True})
    text_site: str = dataclasses.field(metadata={"static": True})

    def density(self, tokens: Int[Array, " T"]) -> Density:
        """The model of the latents given a text; the text's own factor is left out."""
        given = handlers.substitute(self.model, data={self.text_site: tokens})
        args, kwargs = join_static(self.arrays, self.static)
        return posterior.density(handlers.block(given, hide=[self.text_site]), *args, **kwargs)

    def log_density(
        self, position: Float[Array, " D"], tokens: Int[Array, " T"]
    ) -> Float[Array, ""]:
        """log f(z, x), Jacobian of the unconstrained latents included."""
        of = self.density(tokens)
        return of.log_prior(position) + of.log_likelihood(position)

    def given(self, position: Float[Array, "C D"]) -> Target:
        """gamma(x) f(z, x) as a target over C strings, each with latents of its own; or N strings
        with one's, C = 1.
        """
        return self.target * ppl.reward(Link(self, position))

    def start(self, key: PRNGKeyArray, num_chains: int) -> State:
        """Draws from the model without its observations: texts from the language model, latents
        from their priors.
        """
        text_key, latent_key = jax.random.split(key)
        x = ancestral(text_key, self.target, num_chains)
        keys = jax.random.split(latent_key, num_chains)
        position = jax.vmap(lambda key, tokens: self.density(tokens).sample_prior(key))(
            keys, x.tokens
        )
        return State(position, x, self.values(position, x))

    def values(self, position: Float[Array, "C D"], x: Sequences) -> dict[str, Array]:
        """Latent and deterministic sites by name, [C, ...]."""
        return jax.vmap(lambda z, tokens: self.density(tokens).constrain(z))(position, x.tokens)


def joint(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Joint:
    """Find the text site of a NumPyro model and what else there is.

        def model(p, counts):
            rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
            tokens = numpyro.sample("text", ppl.Text(p))
            size = 1 + (tokens != p.lm.eos).sum()
            numpyro.sample("counts", dist.Poisson(rate * size), obs=counts)

        chain = blocks.kernel(blocks.joint(model, p, counts))

    Args:
        model, args, kwargs: text is given to the rest of the model as tokens [T], EOS from its end
            on.  Pass language models as arguments: closed over, their weights become constants of
            compiled programs.

    Raises:
        ValueError: unless there is exactly one latent `ppl.Text` site, outside of plates; if its
            target depends on latents; and as in `posterior.density`, also for discrete latents
            besides the text.
    """
    arrays, static = split_static((args, kwargs))
    arrays = jax.tree.map(jnp.asarray, arrays)
    found: dict[str, ppl.Text] = {}

    def fill(site: dict) -> Any:
        if site["type"] != "sample" or site["is_observed"] or not isinstance(site["fn"], ppl.Text):
            return None
        if site["fn"].batch_shape:  # several texts, as in a plate
            return None
        found[site["name"]] = site["fn"]
        target = site["fn"].target
        return jnp.full(target.max_tokens, target.lm.eos, jnp.int32)

    filled = handlers.substitute(model, substitute_fn=fill)
    handlers.trace(handlers.seed(filled, jax.random.key(0))).get_trace(*args, **kwargs)
    if len(found) != 1:
        raise ValueError(
            "expected one latent text site, numpyro.sample(name, ppl.Text(target)), got"
            f" {sorted(found)}; condition the others on a value, and keep it out of plates"
        )
    name, text = found.popitem()
    whole = Joint(text.target, arrays, model, static, name)
    nothing = jnp.full(text.target.max_tokens, text.target.lm.eos, jnp.int32)
    of = whole.density(nothing)

    def target_at(position: Float[Array, " D"]) -> Target:
        at = handlers.substitute(filled, data=of.constrain(position))
        handlers.trace(handlers.seed(at, jax.random.key(0))).get_trace(*args, **kwargs)
        return found.popitem()[1].target

    if _depends(target_at, of.sample_prior(jax.random.key(0))):
        raise ValueError(
            f"expected a text site whose target does not depend on latents, got {name!r}; write"
            " ppl.Text(p) and the dependence as numpyro.factor, or as the law of another site"
        )
    return whole


def nuts(step_size: float | Float[Array, ""] = 0.3) -> LatentKernel:
    """The No-U-Turn sampler (arXiv 1111.4246) with unit mass."""
    return Partial(_nuts, step_size)


def _nuts(step_size: Any, log_density: LogDensity, dim: int) -> blackjax.SamplingAlgorithm:
    return blackjax.nuts(log_density, step_size, jnp.ones(dim))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Method:
    """The options of `kernel`, checked and bound."""

    of: Joint
    text_kernel: Callable[[Target], Kernel]
    latent_kernel: LatentKernel
    batch_size: int | None = dataclasses.field(metadata={"static": True})


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_blocks.py")
def kernel(
    of: Joint,
    *,
    text_kernel: Callable[[Target], Kernel] = suffix.kernel,
    latent_kernel: LatentKernel = nuts(),  # noqa: B008, a function
    batch_size: int | None = None,
) -> Kernel:
    """Chains over latents and text that leave the posterior of a NumPyro model invariant.

        ten = lambda target: kernels.repeat(suffix.kernel(target), 10)
        chain = blocks.kernel(of, text_kernel=ten)
        state = chain.init(of.start(key, num_chains=8))

    A step moves the latents given the text, then the text given the latents, so a chain's text has
    a target of its own.  By default the text kernel gets all chains at once, as rows of one
    potential: right for kernels that draw a row per chain (`suffix.kernel`).  Kernels that run
    several rows for a chain (`conditional.kernel`, `pimh.kernel`, `multiple_try.kernel`) need
    `batch_size`, and get every chain by itself.  Between steps a text is not scored by the model
    again if the kernel's state is `regeneration.State`.

    Args:
        of: the model, see `joint`.
        text_kernel: of a target; also combinations (`samplers.kernels`).
        latent_kernel: (log density, D) -> blackjax algorithm; fixed, as chains that tune it do not
            have the posterior as their law.
        batch_size: None, or every chain by itself, so many at a time.

    Returns:
        `Kernel`: `init` takes a `State` whose text is strings (`Joint.start`, or your own), infos
            are `Info`; with `batch_size` what the text kernel reports has an axis C in front, but
            for costs, which are those of all chains.

    Raises:
        ValueError: unless batch_size >= 1 or None; by `init` if the text kernel needs batch_size
            and has none, and what the text kernel's raises.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size)
    how = Method(of, as_pytree(text_kernel), as_pytree(latent_kernel), batch_size)
    return Kernel(Partial(_start, how), holding(_step, how))


def _start(how: Method, x: State) -> State:
    strings = x.sequences
    if how.batch_size is None:
        _check_rows(how, *x.position.shape)
    text, _ = _by_chain(_text_start, jax.random.key(0), how, x.position, strings)
    return State(x.position, text, _values(how.of, x.position, strings))


_values = jax.jit(Joint.values)


@jax.jit
def _step(key: PRNGKeyArray, how: Method, x: State) -> tuple[State, Info]:
    latent_key, text_key = jax.random.split(key)
    num, dim = x.position.shape

    def move(key: PRNGKeyArray, position: Array, tokens: Array) -> tuple[Array, Any]:
        algorithm = how.latent_kernel(lambda z: how.of.log_density(z, tokens), dim)
        state, info = algorithm.step(key, algorithm.init(position, None))  # pyright: ignore[reportArgumentType]
        return state.position.astype(position.dtype), info  # pyright: ignore[reportAttributeAccessIssue]

    keys = jax.random.split(latent_key, num)
    position, latent_info = jax.vmap(move)(keys, x.position, x.sequences.tokens)
    text, info = _by_chain(_text_step, text_key, how, position, x.text)
    latents = how.of.values(position, sequences_of(text))
    return State(position, text, latents), Info(latent_info, info)


def _text_start(key: Any, how: Method, position: Array, x: Sequences) -> tuple[X, None]:
    return how.text_kernel(how.of.given(position)).init(x), None


def _text_step(key: Any, how: Method, position: Array, state: X) -> tuple[X, Any]:
    target = how.of.given(position)
    kernel = how.text_kernel(target)
    return kernel.step(key, _rescored(kernel, target, state))


def _by_chain(function: Any, key: Any, how: Method, position: Array, x: X) -> tuple[X, Any]:
    """function(key, how, position, x) -> (y, info) of all chains, or of each by itself."""
    whole = how.batch_size is None
    return (function if whole else functools.partial(_one_by_one, function))(key, how, position, x)


@functools.partial(jax.jit, static_argnums=0)
def _one_by_one(function: Any, key: Any, how: Method, position: Array, x: X) -> tuple[X, Any]:
    num = position.shape[0]

    def one(chain: tuple) -> tuple[X, Any]:
        own_key, *rows = chain
        y, info = function(own_key, how, *jax.tree.map(lambda leaf: leaf[None], rows))
        return jax.tree.map(_only_row, y), info

    chains = jax.random.split(key, num), position, x
    y, info = each_chain(one, chains, min(how.batch_size or 1, num))

    def together(part: Any) -> Any:
        return part.total() if isinstance(part, Cost) else part

    return y, jax.tree.map(together, info, is_leaf=lambda part: isinstance(part, Cost))


def _only_row(leaf: Array) -> Array:
    if leaf.shape[0] != 1:
        raise ValueError(
            f"expected a chain state of one row per chain, got {leaf.shape[0]} rows for one; use"
            " suffix.kernel or conditional.kernel"
        )
    return leaf[0]


def _rescored(kernel: Kernel, target: Target, state: X) -> X:
    """A text kernel's state for the target that new latents make.

    Of a scored string only log Phi is another: latents enter by a reward at the end, which has no
    look-ahead, so no proposal's law depends on them.
    """
    if not isinstance(state, regeneration.State):
        return kernel.init(sequences_of(state))
    x = state.sequences

    def body(potential: PotentialState, t: Array) -> tuple[PotentialState, Array]:
        potential, log_factor, _ = target.factor(
            potential, x.tokens[:, t], t <= x.length, t == target.max_tokens - 1
        )
        return potential, log_factor

    start = target.potential.init(x.length.shape[0])
    log_phi = jax.lax.scan(body, start, jnp.arange(target.max_tokens, dtype=jnp.int32))[1].T
    return dataclasses.replace(state, log_phi=log_phi)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Link:
    """log f(z, x) as the log-score of strings [N, T]; position [C, D] holds the latents of each of
    N = C rows, or of all if C = 1.
    """

    joint: Joint
    position: Float[Array, "C D"]

    def __call__(self, tokens: Int[Array, "N T"], length: Int[Array, " N"]) -> Float[Array, " N"]:
        (chains, dim), num = self.position.shape, tokens.shape[0]
        if chains not in (1, num):
            raise ValueError(
                f"expected a text kernel with one string for each of {chains} chains, got one with"
                f" {num}; pass blocks.kernel(..., batch_size=1), every chain by itself"
            )
        position = jnp.broadcast_to(self.position, (num, dim))
        return jax.vmap(self.joint.log_density)(position, tokens)


def _check_rows(how: Method, num_chains: int, dim: int) -> None:
    """Raise ValueError if the text kernel has another number of rows than there are chains.

    It is traced for one chain more, lest particles be by chance as many as the chains.
    """
    num, horizon = num_chains + 1, how.of.target.max_tokens
    tokens, length = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((num, horizon), (num,)))
    position = jax.ShapeDtypeStruct((num, dim), jnp.float32)
    x = Sequences(tokens, length)  # pyright: ignore[reportArgumentType]
    jax.eval_shape(_started_and_stepped, jax.random.key(0), how, position, x)


@jax.jit
def _started_and_stepped(key: PRNGKeyArray, how: Method, position: Array, x: Sequences) -> Any:
    return _text_step(key, how, position, _text_start(key, how, position, x)[0])


def _depends(function: Callable[[Array], Any], x: Array) -> bool:
    """Whether any output is computed from the input."""
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    tainted = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in tainted for v in equation.invars):
            tainted.update(equation.outvars)
    return any(not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars)
