"""Decode a language model from the command line: weighted strings, evidence, diagnostics, and a
figure.

    python -m experiments.decode --prompt "Tell me a story." --alpha 4 --method power-mh
    python -m experiments.decode --prompt "When did Neil Armstrong walk on the moon? Answer with the
    date only." \\
        --regex "(January|July) [1-9][0-9]?, [12][0-9]{3}" --alpha 4

The target is gamma(x) = p(x | prompt)^alpha Phi(x), Phi the regular expression or JSON schema.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from rich.console import Console

import models
import ppl
from models.tokenizer import Tokenizer
from ppl.target import Target

from .. import compilation
from ..showing import figures, lineages, saving, terminal
from ..showing.saving import Config, Population, Run
from .methods import METHODS, STEPWISE

BAD_INPUT, INTERRUPTED = 2, 130
ERRORS = (ValueError, OSError, ImportError)
"""What wrong input raises; anything else is a defect and keeps its traceback."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = Config(prompt="")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.decode", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add(
        "--prompt",
        required=True,
        help="what the user says (a chat model's own template goes around it)",
    )
    add("--system", help="system message")
    add(
        "--model",
        default=defaults.model,
        help="a registered name, directory, .gguf file or hf:org/name (%(default)s)",
    )
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--regex", help="the whole answer matches this regular expression")
    constraint.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="the answer is JSON that fits this schema"
    )
    add(
        "--alpha",
        type=float,
        default=defaults.alpha,
        help="power of the model; above 1 sharpens (%(default)s)",
    )
    add(
        "--method", choices=list(METHODS), default=defaults.method, help="how to draw (%(default)s)"
    )
    add(
        "--num-particles",
        type=int,
        default=defaults.num_particles,
        metavar="N",
        help="strings to draw (%(default)s)",
    )
    add(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="T",
        help="longest answer (%(default)s)",
    )
    add(
        "--moves-per-block",
        type=int,
        default=defaults.moves_per_block,
        metavar="M",
        help="of chains (%(default)s)",
    )
    add(
        "--block-size",
        type=int,
        default=defaults.block_size,
        metavar="B",
        help="tokens by which chains grow (%(default)s)",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--steps-every", type=int, metavar="K", help="resample after every K tokens, not after each"
    )
    steps.add_argument(
        "--step-delimiter",
        metavar="TEXT",
        help="resample where TEXT (\\n: a line's end) ends a step",
    )
    add("--seed", type=int, default=defaults.seed, help="of the random key (%(default)s)")
    add(
        "--compare",
        action="store_true",
        help="also draw from the model alone, and by masking token by token",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to save (results/decode-METHOD-DIGEST of the options)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for wrong input, 130 if interrupted."""
    args, console = parse(argv), Console()
    compilation.use_cache()
    try:
        return _main(args, console)
    except KeyboardInterrupt:
        console.print("interrupted before there was anything to save")
        return INTERRUPTED


def _main(args: argparse.Namespace, console: Console) -> int:
    try:
        config = _config(args)
        out = args.out or Path("results") / f"decode-{config.method}-{_digest(config)}"
        out.mkdir(parents=True, exist_ok=True)
        with terminal.doing(console, f"loading {config.model}"):
            lm, tokenizer = models.load(config.model)
        with terminal.doing(console, "compiling the prompt and the constraint"):
            target = build_target(config, lm, tokenizer)
            build_steps(config, tokenizer)  # wrong ones are refused before any work
    except ERRORS as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    terminal.introduce(console, config, target)
    with terminal.Progress(console, config, tokenizer) as progress:
        run = decode(config, target, tokenizer, watch=progress.show)
    if config.compare and not run.interrupted:
        key = jax.random.fold_in(
            jax.random.key(config.seed), 1
        )  # the run has consumed the key itself
        # Interrupted here, the run is done all the same, and worth saving.
        with (
            contextlib.suppress(KeyboardInterrupt),
            terminal.doing(console, "drawing in two other ways, to compare"),
        ):
            run = dataclasses.replace(run, comparison=compare(config, key, target, tokenizer))
    terminal.report(console, run)
    saving.save(run, out)
    figures.draw(run).savefig(out / "figure.png", dpi=160)
    console.print(
        f"saved in {out}: {saving.RESULTS}, {saving.ARRAYS}, figure.png",
        style="dim",
        highlight=False,
    )
    return INTERRUPTED if run.interrupted else 0


def _config(args: argparse.Namespace) -> Config:
    """The options, checked as far as they can be without a model."""
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in vars(args).items() if name in names})
    if not (np.isfinite(config.alpha) and config.alpha > 0):
        raise ValueError(f"expected --alpha above 0, got {config.alpha}; 1 is the model itself")
    if config.method == "ancestral" and (config.alpha != 1 or args.regex or args.json_schema):
        raise ValueError(
            "expected a plain language model for --method ancestral, got --alpha, --regex or"
            " --json-schema; use smc"
        )
    if config.method == "tempering" and config.alpha <= 1:
        raise ValueError(
            "expected --alpha above 1 for --method tempering, whose ladder starts at 1, got"
            f" {config.alpha}"
        )
    if config.method not in STEPWISE and (config.steps_every, config.step_delimiter) != (
        None,
        None,
    ):
        raise ValueError(
            f"expected --steps-every or --step-delimiter with --method {' or '.join(STEPWISE)}, got"
            f" {config.method}"
        )
    if args.json_schema is None:
        return config
    try:
        schema = json.loads(args.json_schema.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{args.json_schema}: expected a JSON schema, got {error}; mend the file"
        ) from error
    return dataclasses.replace(config, json_schema=schema)


def _digest(config: Config) -> str:
    """Eight letters for all options, so that equal runs share a folder and different
    ones do not.
    """
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def build_target(config: Config, lm: ppl.LM, tokenizer: Tokenizer) -> Target:
    """gamma(x) = p(x | prompt)^alpha Phi(x) as the options say.

    Raises:
        ValueError: if the prompt, the constraint or a number cannot be used with this model.
    """
    ppl.lm.check_count("num_particles", config.num_particles)
    chat = tokenizer.template is not None or config.system is not None
    prompt = (
        tokenizer.chat(config.prompt, config.system) if chat else tokenizer.encode(config.prompt)
    )
    target = lm.given(prompt, max_tokens=config.max_tokens)
    target = target if config.alpha == 1 else target**config.alpha
    if config.regex is not None:
        target = target * ppl.regex(config.regex, tokenizer)
    if config.json_schema is not None:
        target = target * ppl.json_schema(config.json_schema, tokenizer)
    return target


def build_steps(config: Config, tokenizer: Tokenizer) -> ppl.Steps | None:
    """The steps of text that the options name; None for tokens.

    Raises:
        ValueError: if steps are shorter than a token, or no token holds the delimiter.
    """
    if config.step_delimiter is None:
        return None if config.steps_every is None else ppl.Steps(every=config.steps_every)
    wanted = config.step_delimiter.replace("\\n", "\n").encode()
    ids = [
        token
        for token, text in enumerate(tokenizer.token_bytes)
        if text is not None and wanted and wanted in text
    ]
    if not ids:
        raise ValueError(
            f"expected a --step-delimiter that some token holds, got {config.step_delimiter!r}"
        )
    return ppl.Steps(delimiters=jnp.array(ids, jnp.int32))


def decode(
    config: Config,
    target: Target,
    tokenizer: Tokenizer,
    *,
    watch: Callable[[Population], None] = lambda _: None,
) -> Run:
    """Draw from the target by the method that the options name.

    `watch` gets the population after every round.  An interrupt (Ctrl-C) ends the run with what
    there is by then.

    Raises:
        KeyboardInterrupt: if interrupted before the first round was done.
    """
    key = jax.random.key(config.seed)
    population, interrupted, steps = None, False, build_steps(config, tokenizer)
    start, compiled = time.perf_counter(), compilation.seconds_so_far()
    try:
        for population in METHODS[config.method](key, target, config, steps):
            watch(population)
    except KeyboardInterrupt:
        interrupted = True
        if population is None:
            raise
    assert population is not None
    seconds = {
        "total": time.perf_counter() - start,
        "compiling": compilation.seconds_so_far() - compiled,
    }
    return Run(
        config=config,
        population=population,
        texts=saving.texts(population, tokenizer),
        pieces=saving.pieces(population.history, tokenizer),
        seconds=seconds,
        comparison={},
        interrupted=interrupted,
        key=np.asarray(jax.random.key_data(key)).tolist(),
        versions=saving.versions(),
        device=saving.device(),
    )


def compare(
    config: Config, key: PRNGKeyArray, target: Target, tokenizer: Tokenizer
) -> dict[str, list[tuple[str, float]]]:
    """What two common ways of drawing make of the same target, as many strings each: shares of
    strings.

    "model alone" ignores alpha and Phi.  "masked" draws every token from p^alpha times what Phi
    allows next and ignores the weights: what constrained generation usually does.
    """
    masked_key, alone_key = jax.random.split(key)
    *_, last = METHODS["importance"](masked_key, target, config, None)
    alone = dataclasses.replace(target, alpha=None, potential=ppl.Product())
    [plain] = METHODS["ancestral"](alone_key, alone, config, None)
    shares: dict[str, list[tuple[str, float]]] = {}
    for name, p in (("masked", last), ("model alone", plain)):
        unweighted = dataclasses.replace(p, log_weights=np.zeros_like(p.log_weights))
        shares[name] = lineages.merged(saving.texts(unweighted, tokenizer), unweighted.weights)
    return shares


if __name__ == "__main__":
    sys.exit(main())
