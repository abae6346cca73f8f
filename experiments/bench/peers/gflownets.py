"""Training steps of a GFlowNet per second, beside gfnx and torchgfn, on equal environments, batches
and networks.

    hypergrid          4 dimensions of side 20, reward 1e-3 + 0.5 + 2 (gfnx's baseline; each side's
                       own environment)
    bit sequences      8 bits in words of 2, written at any free position, 4 modes, exponent 2
                       (torchgfn's benchmark)
    long sequences     120 bits in words of 8, 60 modes, exponent 3 (gfnx's baseline), where the
                       network's products of matrices, of 2 million weights, are nearly all of the
                       work

A step draws 16 trajectories from the policy with uniform actions mixed in (1 in 10), scores them
again under it, and takes one Adam step on trajectory balance (1e-3, and 0.1 for log Z).  The policy
is a multilayer perceptron of two hidden layers of 256 on one-hot inputs; P_B is uniform.

    tiltlm      `amortized.graphs.trajectories` and `amortized.objectives.balance`, a round is one
                compiled scan
    gfnx        its environments and `forward_rollout`, a round is one compiled scan
    torchgfn    its environments, `Sampler` and `TBGFlowNet`, as in its own scripts,
                log-probabilities scored anew

Every side goes on training from round to round, so that trajectories grow as they do in use: gfnx
always makes as many moves as a trajectory can have, the other two stop with the longest of the
batch.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import gfnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from gfn.estimators import DiscretePolicyEstimator
from gfn.gflownet import TBGFlowNet
from gfn.gym import HyperGrid
from gfn.gym.bitSequenceNonAutoregressive import NonAutoregressiveBitSequence
from gfn.preprocessors import KHotPreprocessor, Preprocessor
from gfn.samplers import Sampler
from gfn.utils.modules import MLP, DiscreteUniform

from amortized.graphs import environments, trajectories
from amortized.objectives import balance

from .report import OURS, table, take_turns, time_ratio

BATCH, EPSILON, WIDTH, DEPTH = 16, 0.1, 256, 2
RATE, LOG_Z_RATE = 1e-3, 0.1
DIM, SIDE = 4, 20
STEPS = 20
GFNX, TORCHGFN = "gfnx", "torchgfn"

Side = Callable[[int], float]
"""Makes `STEPS` training steps with this seed and returns the mean number of moves."""


class Bits(NamedTuple):
    """Bit sequences; modes [M, bits] are drawn once, for all sides."""

    bits: int
    word: int
    num_modes: int
    exponent: float

    @property
    def modes(self) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 2, (self.num_modes, self.bits))

    @property
    def words(self) -> int:
        return 2**self.word

    @property
    def places(self) -> int:
        return self.bits // self.word


def compare(rounds: int) -> dict[str, float]:
    """Print all environments; the ratios of training steps per second, ours over theirs."""
    environments_of = {
        "": (
            "hypergrid",
            {
                OURS: ours(environments.hypergrid(DIM, SIDE)),
                GFNX: gfnx_grid(),
                TORCHGFN: torch_grid(),
            },
        ),
        "-bits": ("bit sequences", bit_sides(Bits(8, 2, 4, 2.0))),
        "-long-bits": ("long sequences", bit_sides(Bits(120, 8, 60, 3.0))),
    }
    ratios = {}
    for suffix, (name, sides) in environments_of.items():
        seconds, moves = take_turns(sides, rounds, f"Training on {name}")
        rows = []
        for side, times in seconds.items():
            faster = "" if side == OURS else f"{time_ratio(seconds, side):.2f}"
            rate, length = STEPS / statistics.median(times), statistics.mean(moves[side])
            rows.append((side, f"{rate:.1f}", f"{length:.1f}", faster))
        table(
            f"{name}, trajectory balance, batch {BATCH}",
            ("side", "steps/s", "moves", "faster by"),
            rows,
        )
        ratios |= {f"{side}{suffix}": time_ratio(seconds, side) for side in (GFNX, TORCHGFN)}
    return ratios


def bit_sides(of: Bits) -> dict[str, Side]:
    env = environments.bit_sequences(of.modes, word_bits=of.word, exponent=of.exponent)
    return {OURS: ours(env), GFNX: gfnx_bits(of), TORCHGFN: torch_bits(of)}


# The two sides in JAX share the network, the optimiser and the loop.

Loss = Callable[
    [Callable[[jax.Array], jax.Array], jax.Array, jax.Array], tuple[jax.Array, jax.Array]
]
"""(network on [*N, F], log Z, key) -> (loss, moves [N])."""


def training(num_features: int, num_actions: int, loss: Loss) -> Side:
    net = eqx.nn.MLP(num_features, num_actions, WIDTH, DEPTH, key=jax.random.key(0))
    params, static = eqx.partition((net, jnp.zeros(())), eqx.is_inexact_array)
    rates = (jax.tree.map(lambda _: "net", params[0]), "log_z")
    optimizer = optax.multi_transform(
        {"net": optax.adam(RATE), "log_z": optax.adam(LOG_Z_RATE)}, rates
    )

    def objective(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        net, log_z = eqx.combine(params, static)
        return loss(functools.partial(batched, net), log_z, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        def step(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
            params, state = carry
            gradient, moves = jax.grad(objective, has_aux=True)(params, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), moves.mean()

        return jax.lax.scan(step, carry, jax.random.split(key, STEPS))

    carry = (params, optimizer.init(params))

    def run(seed: int) -> float:
        nonlocal carry
        carry, moves = train(carry, jax.random.key(seed))
        jax.block_until_ready(carry)
        return float(moves.mean())

    return run


def batched(net: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    """The network on any number of leading axes, as products of matrices."""
    for layer in net.layers[:-1]:
        x = jax.nn.relu(x @ layer.weight.T + layer.bias)
    return x @ net.layers[-1].weight.T + net.layers[-1].bias


def ours(env: environments.Environment) -> Side:
    def loss(net: Callable, log_z: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def policy(state: jax.Array) -> trajectories.Outputs:
            return trajectories.Outputs(net(env.features(state)))

        paths = trajectories.rollout(key, env, policy, BATCH, EPSILON)
        scored, _ = trajectories.evaluate(env, policy, paths)
        return balance.tb(scored, log_z), paths.length

    return training(env.features(env.initial).shape[-1], env.num_moves + 1, loss)


def gfnx_training(
    env: Any,
    env_params: Any,
    num_features: int,
    num_actions: int,
    features: Callable,
    log_stop: int,
) -> Side:
    """TB by gfnx's rollout and masks; `log_stop` is 1 where stopping is an action of its own, else
    0.
    """

    def loss(net: Callable, log_z: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def policy(key: jax.Array, obs: jax.Array, params: Any) -> tuple[jax.Array, dict]:
            logits = net(features(obs))
            explores = jax.random.bernoulli(key, EPSILON, (BATCH, 1))
            return jnp.where(explores, 0.0, logits), {}

        drawn, _ = gfnx.utils.forward_rollout(key, BATCH, policy, None, env, env_params)
        drawn = jax.lax.stop_gradient(drawn)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn.state)
        invalid = env.get_invalid_mask(flat, env_params).reshape(*drawn.action.shape, -1)
        log_pf = jax.nn.log_softmax(jnp.where(invalid, -jnp.inf, net(features(drawn.obs))))
        log_pf = jnp.take_along_axis(log_pf, drawn.action[..., None], axis=-1)[..., 0]
        no_undo = env.get_invalid_backward_mask(flat, env_params).reshape(*drawn.action.shape, -1)
        log_pb = -jnp.log(jnp.maximum((~no_undo).sum(-1), 1))[:, 1:]
        made = ~drawn.pad
        moves = made.sum(1) - log_stop
        undone = jnp.arange(log_pb.shape[1]) < moves[:, None]
        log_reward = jnp.where(made, drawn.log_gfn_reward, 0.0).sum(1)
        t = (
            log_z
            + jnp.where(made, log_pf, 0.0).sum(1)
            - jnp.where(undone, log_pb, 0.0).sum(1)
            - log_reward
        )
        return (t**2).mean(), moves

    return training(num_features, num_actions, loss)


def gfnx_grid() -> Side:
    env = gfnx.HypergridEnvironment(gfnx.EasyHypergridRewardModule(), dim=DIM, side=SIDE)
    return gfnx_training(env, env.init(jax.random.key(0)), DIM * SIDE, DIM + 1, lambda obs: obs, 1)


def gfnx_bits(of: Bits) -> Side:
    reward = gfnx.BitseqRewardModule(of.bits, of.word, of.num_modes, of.exponent)
    env = gfnx.BitseqEnvironment(reward, n=of.bits, k=of.word)
    env_params = env.init(jax.random.key(0)).replace(
        reward_params={"mode_set": jnp.asarray(of.modes, bool)}
    )

    def features(obs: jax.Array) -> jax.Array:
        words = obs[..., 1:]  # the first is the begin token
        return jax.nn.one_hot(words, of.words + 1).reshape(*words.shape[:-1], -1)

    return gfnx_training(
        env, env_params, of.places * (of.words + 1), of.places * of.words, features, 0
    )


class Words(Preprocessor):
    """Words, and -1 where there is none, as one-hot vectors."""

    def __init__(self, of: Bits) -> None:
        super().__init__(output_dim=of.places * (of.words + 1))
        self.values = of.words + 1

    def preprocess(self, states: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(states.tensor + 1, self.values).flatten(-2).float()


def torch_training(env: Any, preprocessor: Preprocessor) -> Side:
    torch.manual_seed(0)
    net = MLP(preprocessor.output_dim, env.n_actions, hidden_dim=WIDTH, n_hidden_layers=DEPTH)
    forward = DiscretePolicyEstimator(
        net, env.n_actions, preprocessor=preprocessor, is_backward=False
    )
    uniform = DiscreteUniform(env.n_actions - 1)
    backward = DiscretePolicyEstimator(
        uniform, env.n_actions, preprocessor=preprocessor, is_backward=True
    )
    gflownet = TBGFlowNet(pf=forward, pb=backward, init_logZ=0.0)
    optimizer = torch.optim.Adam(gflownet.pf_pb_parameters(), lr=RATE)
    optimizer.add_param_group({"params": gflownet.logz_parameters(), "lr": LOG_Z_RATE})
    sampler = Sampler(estimator=forward)

    def run(seed: int) -> float:
        torch.manual_seed(seed)
        moves = []
        for _ in range(STEPS):
            drawn = sampler.sample_trajectories(env, n=BATCH, save_logprobs=False, epsilon=EPSILON)
            optimizer.zero_grad()
            gflownet.loss(env, drawn, recalculate_all_logprobs=True).backward()
            optimizer.step()
            moves.append(drawn.terminating_idx.float().mean().item() - 1)
        return statistics.mean(moves)

    return run


def torch_grid() -> Side:
    rewards = {"R0": 1e-3, "R1": 0.5, "R2": 2.0}
    env = HyperGrid(DIM, SIDE, reward_fn_kwargs=rewards, validate_modes=False)
    return torch_training(env, KHotPreprocessor(height=SIDE, ndim=DIM))


def torch_bits(of: Bits) -> Side:
    env = NonAutoregressiveBitSequence(of.word, of.bits, of.num_modes, of.exponent)
    env.modes = torch.as_tensor(of.modes, dtype=env.modes.dtype)
    return torch_training(env, Words(of))
