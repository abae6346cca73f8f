"""Decode a language model from the command line: weighted strings, evidence, diagnostics, and a
figure.

    tiltlm --prompt "Tell me a story." --alpha 4 --method power-mh
    tiltlm --prompt "When did Neil Armstrong walk on the moon? Answer with the date only." \\
        --regex "(January|July) [1-9][0-9]?, [12][0-9]{3}" --alpha 4

`tiltlm` is the same as `python -m experiments.decode`.

The target is gamma(x) = p(x | prompt)^alpha Phi(x), Phi the regular expression or JSON schema.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import models
from ppl.files import replacing

from .. import compilation, grid
from ..showing import figures, saving, terminal
from ..showing.saving import Config
from .decoding import build_steps, build_target, compare, decode
from .methods import METHODS, STEPWISE

DEFAULTS = Config(prompt="")
BAD_INPUT, INTERRUPTED = 2, 130
ERRORS = (ValueError, OSError, ImportError)
"""What wrong input raises; anything else is a defect and keeps its traceback."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tiltlm", description=grid.summary(__doc__ or ""))
    _add_target(parser)
    _add_method(parser)
    add = parser.add_argument
    add("--seed", type=int, default=DEFAULTS.seed, help="of the random key (%(default)s)")
    compared = "also draw from the model alone, and by masking token by token"
    add("--compare", action="store_true", help=compared)
    where = "where to save (results/decode-METHOD-DIGEST of the options)"
    add("--out", type=Path, metavar="DIR", help=where)
    return parser.parse_args(argv)


def _add_target(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    said = "what the user says (a chat model's own template goes around it)"
    add("--prompt", required=True, help=said)
    add("--system", help="system message")
    model = "a registered name, directory, .gguf file or hf:org/name (%(default)s)"
    add("--model", default=DEFAULTS.model, help=model)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--regex", help="the whole answer matches this regular expression")
    schema = "the answer is JSON that fits this schema"
    constraint.add_argument("--json-schema", type=Path, metavar="FILE", help=schema)
    power = "power of the model; above 1 sharpens (%(default)s)"
    add("--alpha", type=float, default=DEFAULTS.alpha, help=power)


def _add_method(parser: argparse.ArgumentParser) -> None:
    def count(option: str, default: int, metavar: str, text: str) -> None:
        text = f"{text} (%(default)s)"
        parser.add_argument(option, type=int, default=default, metavar=metavar, help=text)

    how = {
        "choices": list(METHODS),
        "default": DEFAULTS.method,
        "help": "how to draw (%(default)s)",
    }
    parser.add_argument("--method", **how)
    count("--num-particles", DEFAULTS.num_particles, "N", "strings to draw")
    count("--max-tokens", DEFAULTS.max_tokens, "T", "longest answer")
    count("--moves-per-block", DEFAULTS.moves_per_block, "M", "of chains")
    count("--block-size", DEFAULTS.block_size, "B", "tokens by which chains grow")
    steps = parser.add_mutually_exclusive_group()
    every = "resample after every K tokens, not after each"
    steps.add_argument("--steps-every", type=int, metavar="K", help=every)
    delimiter = "resample where TEXT (\\n: a line's end) ends a step"
    steps.add_argument("--step-delimiter", metavar="TEXT", help=delimiter)


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
        # The run has consumed the key itself.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        # Interrupted here, the run is done all the same, and worth saving.
        with (
            contextlib.suppress(KeyboardInterrupt),
            terminal.doing(console, "drawing in two other ways, to compare"),
        ):
            run = dataclasses.replace(run, comparison=compare(config, key, target, tokenizer))
    terminal.report(console, run)
    (out / "figure.png").unlink(missing_ok=True)  # that of another run
    saving.save(run, out)
    with replacing(out / "figure.png") as fresh:
        figures.draw(run).savefig(fresh, dpi=160)
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


if __name__ == "__main__":
    sys.exit(main())
