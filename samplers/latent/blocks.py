"""NumPyro models with text in them: chains that alternate moves of the continuous latents and moves
of the text.

A model with one latent text site x ~ gamma(x) (`ppl.Text`), continuous latents z and other factors
has the density

    pi(z, x) proportional to gamma(x) f(z, x),     f the density of all other sites, latent and observed

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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro import handlers

import ppl
from ppl.ancestral import ancestral
from ppl.checks import check_count
from ppl.potential import State as PotentialState
from ppl.pytrees import register_dataclass
from ppl.scorers import Scorer
from ppl.sequences import Sequences
from ppl.showing import shown
from ppl.target import Target

from ..base import Guarantee, Kernel, X, each_chain
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
    """What a step of C chains did: blackjax's info of the latents' move, leaves [C, ...], and the
    text kernel's.
    """

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
            numpyro.sample("counts", dist.Poisson(rate * (1 + (tokens != p.lm.eos).sum())),
            obs=counts)

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
        found[site["name"]] = site["fn"]
        target = site["fn"].target
        return jnp.full(target.max_tokens, target.lm.eos, jnp.int32)

    filled = handlers.substitute(model, substitute_fn=fill)
    handlers.trace(handlers.seed(filled, jax.random.key(0))).get_trace(*args, **kwargs)
    if len(found) != 1:
        raise ValueError(
            "expected one latent text site, numpyro.sample(name, ppl.Text(target)), got"
            f" {sorted(found)}; condition the"
            " others on a value, and keep it out of plates"
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
            " ppl.Text(p) and the"
            " dependence as numpyro.factor, or as the law of another site"
        )
    return whole


def nuts(step_size: float | Float[Array, ""] = 0.3) -> LatentKernel:
    """The No-U-Turn sampler (arXiv 1111.4246) with unit mass."""
    return lambda log_density, dim: blackjax.nuts(log_density, step_size, jnp.ones(dim))


@sampler(Guarantee.EXACT, proof="tests/samplers/latent/test_blocks.py")
def kernel(
    of: Joint,
    *,
    text_kernel: Callable[[Target], Kernel] = suffix.kernel,
    latent_kernel: LatentKernel = nuts(),  # noqa: B008, a function
    batch_size: int = 1,
) -> Kernel:
    """Chains over latents and text that leave the posterior of a NumPyro model invariant.

        chain = blocks.kernel(of, text_kernel=lambda target: kernels.repeat(suffix.kernel(target),
        10)) state = chain.init(of.start(key, num_chains=8))

    A step moves the latents given the text, then the text given the latents, so a chain's text has
    a target of its own. Kernels that take a row per chain (`suffix.kernel`) get all of these at
    once, as rows of one potential; those that run a population for every chain
    (`conditional.kernel`, `pimh.kernel`) get one chain after another.  Between steps a text is not
    scored by the model again if the kernel's state is `regeneration.State`.

    Args:
        of: the model, see `joint`.
        text_kernel: of a target; also combinations (`samplers.kernels`).
        latent_kernel: (log density, D) -> blackjax algorithm; fixed, as chains that tune it do not
            have the posterior as their law.
        batch_size: chains at a time for kernels that take them one after another.

    Returns:
        `Kernel`: `init` takes a `State` whose text is strings (`Joint.start`, or your own), infos
            are `Info`.

    Raises:
        ValueError: unless batch_size >= 1; and by `init` what the text kernel's raises.
    """
    check_count("batch_size", batch_size)

    def init(x: State) -> State:
        strings = x.sequences
        rows = _takes_rows(of, text_kernel, x.position.shape)
        text = _mapped(
            of, text_kernel, x.position, rows, batch_size, lambda k, target, x: k.init(x), strings
        )
        return State(x.position, text, of.values(x.position, strings))

    def step(key: PRNGKeyArray, x: State) -> tuple[State, Info]:
        return _step(key, of, x, text_kernel, latent_kernel, batch_size)

    return Kernel(init, step)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _step(
    key: Any, of: Joint, x: State, text_kernel: Any, latent_kernel: Any, batch_size: int
) -> tuple[State, Info]:
    latent_key, text_key = jax.random.split(key)
    num, dim = x.position.shape

    def move(key: PRNGKeyArray, position: Array, tokens: Array) -> tuple[Array, Any]:
        algorithm = latent_kernel(lambda z: of.log_density(z, tokens), dim)
        state, info = algorithm.step(key, algorithm.init(position, None))  # pyright: ignore[reportArgumentType]
        return state.position, info

    position, latent_info = jax.vmap(move)(
        jax.random.split(latent_key, num), x.position, x.sequences.tokens
    )

    def text(kernel: Kernel, target: Target, arrays: tuple) -> tuple[X, Any]:
        key, state = arrays
        return kernel.step(key, _rescored(kernel, target, state))

    rows = _takes_rows(of, text_kernel, x.position.shape)
    keys = text_key if rows else jax.random.split(text_key, num)
    moved, info = _mapped(of, text_kernel, position, rows, batch_size, text, (keys, x.text))
    values = of.values(position, sequences_of(moved))
    return State(position, moved, values), Info(latent_info, info)


def _mapped(
    of: Joint,
    text_kernel: Any,
    position: Float[Array, "C D"],
    rows: bool,
    batch_size: int,
    apply: Any,
    arrays: Any,
) -> Any:
    """apply(kernel, target, arrays) for all chains at once, or for one after another, each a batch
    of one.
    """
    if rows:
        target = of.given(position)
        return apply(text_kernel(target), target, arrays)

    def one(chain: tuple) -> Any:
        position, arrays = chain
        target = of.given(position[None])
        is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
        single = jax.tree.map(lambda leaf: leaf if is_key(leaf) else leaf[None], arrays)
        out = apply(text_kernel(target), target, single)
        return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[:1] == (1,) else leaf, out)

    return each_chain(one, (position, arrays), min(batch_size, position.shape[0]))


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
    log_phi = jax.lax.scan(body, start, jnp.arange(target.max_tokens))[1].T
    return dataclasses.replace(state, log_phi=log_phi)


# The other factors as a potential.


class _NotByRows(ValueError):
    """A text kernel asked for another number of strings than there are chains."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Link(Scorer):
    """log f(z, x) as the log-score of a string; position [C, D] holds the latents of each of its C
    rows.

    State = (tokens [N, T], latents [N, D]), N = C, or any N if C = 1.
    """

    joint: Joint
    position: Float[Array, "C D"]

    def init(self, num: int) -> PotentialState:
        chains, dim = self.position.shape
        if chains not in (1, num):
            raise _NotByRows(
                f"expected a text kernel with one string for each of {chains} chains, got one with"
                f" {num}; this is a"
                " fault of blocks.kernel"
            )
        target = self.joint.target
        tokens = jnp.full((num, target.max_tokens), target.lm.eos, jnp.int32)
        return tokens, jnp.broadcast_to(self.position, (num, dim))

    def push(
        self, state: PotentialState, token: Int[Array, " N"], used: Int[Array, " N"]
    ) -> PotentialState:
        tokens, position = state
        here = jnp.arange(tokens.shape[1]) == used[:, None]
        return jnp.where(here, token[:, None], tokens), position

    def score(
        self, state: PotentialState, used: Int[Array, " N"], needed: Bool[Array, " N"]
    ) -> Float[Array, " N"]:
        tokens, position = state
        return jax.vmap(self.joint.log_density)(position, tokens)


def _takes_rows(of: Joint, text_kernel: Callable[[Target], Kernel], shape: tuple[int, ...]) -> bool:
    """Whether the kernel works on one string per chain, and not on a population for each.

    Found by tracing it for one chain more: a population that is by chance as large as the number of
    chains is not so then, and would get every latent wrong without this.
    """
    num, horizon = shape[0] + 1, of.target.max_tokens

    def probe(key: PRNGKeyArray, of: Joint, position: Array, x: Sequences) -> Any:
        kernel = text_kernel(of.given(position))
        return kernel.step(key, kernel.init(x))

    strings = Sequences(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((num, horizon), (num,))))  # pyright: ignore
    key = jax.eval_shape(jax.random.key, 0)
    try:
        jax.eval_shape(probe, key, of, jax.ShapeDtypeStruct((num, shape[1]), jnp.float32), strings)
    except _NotByRows:
        return False
    return True


def _depends(function: Callable[[Array], Any], x: Array) -> bool:
    """Whether any output is computed from the input."""
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    tainted = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in tainted for v in equation.invars):
            tainted.update(equation.outvars)
    return any(not isinstance(v, Literal) and v in tainted for v in jaxpr.outvars)
