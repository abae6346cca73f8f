"""One population over several processes: the way past one machine.

    python -m experiments.distributed --processes 2

starts two processes here, which find each other by `jax.distributed` and share the particles of one
SMC run; process 0 prints the strings.  On several machines, start the same command once on each,
with the address of the first:

    python -m experiments.distributed --processes 2 --process-id 0 --coordinator first-machine:9876
    python -m experiments.distributed --processes 2 --process-id 1 --coordinator first-machine:9876

Every process holds the whole model and an equal share of the particles; only the rows that
resampling moves, and the weights, travel.  The same key gives the same strings as on one device.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ppl
from models import tabular
from ppl.target import Target
from samplers import smc
from samplers.results import Weighted

VOCAB_SIZE, EOS, MAX_TOKENS = 6, 1, 12


def tabular_target() -> Target:
    """A small hidden Markov model with a process reward: what is run where no model is named."""
    lm = tabular.random_hmm(jax.random.key(7), 5, VOCAB_SIZE, eos=EOS)
    score = ppl.step_scores(
        lambda tokens, length: 0.3 * (tokens == 3).sum(1) - 0.1 * length, ppl.Steps(every=2)
    )
    return lm.given([2, 0], max_tokens=MAX_TOKENS) ** 0.7 * score


def real_target(model: str, prompt: str) -> Target:
    """A language model's law of answers to `prompt`, squared."""
    import models

    lm, tokenizer = models.load(model)
    return lm.given(tokenizer.chat(prompt), max_tokens=MAX_TOKENS) ** 2


def run(target: Target, num_particles: int, seed: int) -> Weighted:
    """SMC over all devices of all processes; every process gets the whole result."""
    mesh = Mesh(np.array(jax.devices()), ("particles",))
    whole = NamedSharding(mesh, PartitionSpec())
    target = jax.device_put(jax.device_get(target), whole)
    key = jax.jit(jax.random.key, out_shardings=whole)(
        np.uint32(seed)
    )  # typed keys cannot be put across processes
    out = smc.run(key, target, num_particles=num_particles, threshold=0.9, mesh=mesh)
    return jax.jit(lambda tree: tree, out_shardings=whole)(out)


def work(args: argparse.Namespace) -> None:
    """One process of the run."""
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    target = tabular_target() if args.model is None else real_target(args.model, args.prompt)
    out = jax.device_get(run(target, args.num_particles, args.seed))
    if args.process_id == 0:
        found = {
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "log_z": float(out.log_z),
            "resampled": int(out.trace.resampled.sum()),
            "tokens": out.sequences.tokens.tolist(),
        }
        print(json.dumps(found), flush=True)


def launch(args: argparse.Namespace) -> int:
    """Start all processes on this machine and wait for them; ends those that are left if
    one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "experiments.distributed",
        *sys.argv[1:],
        "--coordinator",
        address,
    ]
    started = [
        subprocess.Popen([*command, "--process-id", str(i)], env=os.environ)
        for i in range(args.processes)
    ]
    try:
        return max(abs(process.wait(timeout=args.timeout)) for process in started)
    finally:
        for process in started:
            process.kill()


def main() -> None:
    """Work if this is one process of a run, else launch them all."""
    parser = argparse.ArgumentParser(prog="python -m experiments.distributed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--num-particles", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="as in models.load; by default a small tabular model")
    parser.add_argument(
        "--prompt", default="Name a famous date in history. Answer with the date only."
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for the local processes"
    )
    args = parser.parse_args()
    if (args.process_id is None) != (args.coordinator is None):
        parser.error(
            "expected --process-id and --coordinator together, got one; leave out both to run on"
            " this machine"
        )
    if args.process_id is None:
        sys.exit(launch(args))
    work(args)


if __name__ == "__main__":
    main()
