"""Our timings beside other libraries', on the same models and densities, in one process.

    python -m experiments.bench.peers

    generate               `text`: plain decoding, against transformers' `generate`
    genlm-control          `text`: the same against genlm-control's SMC
    genlm-control-awrs     `awrs`: a regular expression; genlm-control with AWRS against
                           p * ppl.regex, at equal ESS
    its-hub-...            `hub`: self-consistency, best-of-n and beam search over steps, by tokens
                           per second
    its-hub                the three together: their geometric mean
    awrs-against-awrs      `awrs`: the same against our AWRS, which is told as little in advance
    power-mh-8             `power`: 8 chains of power sampling, against one over transformers, by
                           moves per second
    power-mh-32            the same with 32 chains
    blackjax-tempered      `tempered`: adaptive tempered SMC on one density, at equal ESS
    blackjax-tempered-log-z                the same at equal mean squared error of log Z
    gfnx, torchgfn         `gflownets`: training steps of trajectory balance, hypergrid
    gfnx-bits, -long-bits, torchgfn-...    the same, bit sequences

Each label is how many times more seconds the other library takes; above 1 we are faster.  Sides
take turns; times are medians of the ratio within a round, after one round of warm-up (compilation
on our side, caches on theirs).

Where other work runs on the machine, torch's threads wait for each other at every layer, which
slows the other side down far more than ours.  Give all of it one core there, or the ratios flatter
us: taskset -c 0 make bench-peers.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings

import jax
import torch
import transformers

from . import awrs, gflownets, hub, power, tempered, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    parser.add_argument(
        "--tempered-rounds",
        type=int,
        default=100,
        help="of tempered SMC, which takes under a second",
    )
    parser.add_argument("--training-rounds", type=int, default=10, help="of 20 training steps")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()

    ratios = tempered.compare(options.tempered_rounds)
    ratios |= gflownets.compare(options.training_rounds)
    setting = text.load()
    ratios |= text.compare(setting, options.rounds)
    ratios |= hub.compare(setting, options.rounds)
    ratios |= awrs.compare(setting, options.rounds)
    ratios |= power.compare(setting, options.rounds)
    load = f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    device = f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} torch threads, load {load}"
    print(
        json.dumps(
            {
                "name": "peers",
                "ratios": {k: round(v, 3) for k, v in ratios.items()},
                "device": device,
            }
        )
    )


if __name__ == "__main__":
    main()
