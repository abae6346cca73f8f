"""What the command `experiments.decode` does, as functions: a target of the options, its draws."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

import ppl
from models.tokenizer import Tokenizer
from ppl.checks import check_count
from ppl.target import Target
from samplers.saving import device, versions

from .. import compilation
from ..showing import lineages, saving
from ..showing.saving import Config, Population, Run
from .methods import METHODS


def build_target(config: Config, lm: ppl.LM, tokenizer: Tokenizer) -> Target:
    """gamma(x) = p(x | prompt)^alpha Phi(x) as the options say.

    Raises:
        ValueError: if the prompt, the constraint or a number cannot be used with this model.
    """
    check_count("num_particles", config.num_particles)
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
        ValueError: if steps are shorter than a token, or no text has the delimiter.
    """
    if config.step_delimiter is None:
        return None if config.steps_every is None else ppl.Steps(every=config.steps_every)
    wanted = config.step_delimiter.replace("\\n", "\n")
    try:
        return ppl.Steps.by_text(wanted, tokenizer)
    except ValueError as error:
        raise ValueError(f"--step-delimiter: {error}") from error


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
        versions=versions(),
        device=device(),
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
