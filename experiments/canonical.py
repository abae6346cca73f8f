"""The tokenizer's own segmentation: is it exact, how often does the model keep it, what does it
cost, and what does it help?

    python -m experiments.canonical

Random strings of SmolLM2's vocabulary (byte-level) and of one that is trained here as sentencepiece
trains them: `ppl.canonical` against encode(decode(x)) = x.  How many of the model's own draws are
their own segmentation.  Whole runs of SMC with it over the same without, in turns, per step.  And
the README's target, a date, at several powers: log Z with all segmentations and with the own alone.
"""

from __future__ import annotations

import argparse
import functools
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import pre_tokenizers, trainers

import models
import ppl
from models.gguf_file import GGUFFile
from models.gguf_tokenizer import from_gguf
from models.tokenizer import Tokenizer
from ppl.canonical import CanonicalAutomaton
from ppl.space import Space
from samplers import smc
from samplers.draws import ancestral
from samplers.strings import proposals

from . import compilation
from .bench import smc_overhead, turns

HORIZON, BATCH = 48, 2000
PROMPTS = (
    "Name a famous date in history. Answer with the date only.",
    smc_overhead.PROMPT,
    "Write a function in Python that counts words.",
    "List three prime numbers above 1000, and say why they are prime.",
)
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = rf"({MONTHS}) [1-9][0-9]?, [12][0-9]{{3}}"
PIECES = [
    *"abcdefghijklmnopqrstuvwxyzABCDEIST0123456789 \n\t.,:;!?'\"()[]{}<>=+-*/_#",
    *("  ", "   ", "\r\n", "'s", "'re", "'ll", "the", " the", "...", "2024", "é", "ß", "½", "中"),
    *("\xa0", "\u2009", "\u0301", "😀", "👩‍👧", "ı", "Straße", "naïve", " Привет", "東京", "\x00"),
]  # fmt: skip


def trained(size: int = 4000) -> Tokenizer:
    """A vocabulary as sentencepiece makes them, with bytes for rare characters, of Python's own
    documentation.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    model.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    pieces = [piece for piece, _ in sorted(model.get_vocab().items(), key=lambda entry: entry[1])]
    # Characters come last, as the least likely.
    pieces = sorted(pieces, key=lambda piece: len(piece) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        # A text begins without a space in front, so that encode(decode(x)) says it all.
        "tokenizer.ggml.add_space_prefix": False,
    }
    return from_gguf(GGUFFile(Path("trained"), metadata, {}))


def random_strings(tok: Tokenizer, num: int, seed: int) -> list[list[int]]:
    """Strings of at most `HORIZON` tokens: a third own segmentations of random texts, the others
    random tokens, and own segmentations of which a stretch is written otherwise.
    """
    rng = np.random.default_rng(seed)
    names = {value: token for token, value in enumerate(tok.token_bytes) if value is not None}
    tokens, found = np.array(list(names.values())), list[list[int]]()
    while len(found) < num:
        if rng.random() < 0.2:
            found.append(rng.choice(tokens, rng.integers(1, 6)).tolist())
            continue
        if rng.random() < 0.5:
            text = "".join(rng.choice(PIECES, rng.integers(1, 12)))
        else:
            drawn = rng.choice(tokens, rng.integers(1, 6)).tolist()
            text = b"".join(tok.token_bytes[token] or b"" for token in drawn).decode(
                errors="ignore"
            )
        x = tok.encode(text, add_special_tokens=False)
        if x and rng.random() < 0.6:
            cut = rng.integers(len(x))
            parts = [tok.token_bytes[token] or b"" for token in x[cut : cut + 3]]
            x[cut : cut + 3] = otherwise(b"".join(parts), names, rng)
        if len(x) < HORIZON:
            found.append(x)
    return found


def otherwise(data: bytes, names: dict[bytes, int], rng: np.random.Generator) -> list[int]:
    """Bytes in tokens of random lengths."""
    found = []
    while data:
        sizes = [size for size in range(1, len(data) + 1) if data[:size] in names]
        size = int(rng.choice(sizes)) if rng.random() < 0.7 else sizes[-1]
        found.append(names[data[:size]])
        data = data[size:]
    return found


@jax.jit
def log_phi(phi: CanonicalAutomaton, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """log Phi [N] of strings [N, T], one token at a time."""

    def body(carry: Any, now: Any) -> Any:
        state, total = carry
        token, inside = now
        after, factor = phi.step(state, token)
        state = jax.tree.map(lambda new, old: jnp.where(inside, new, old), after, state)
        return (state, total + jnp.where(inside, factor, 0)), None

    inside = jnp.arange(tokens.shape[1])[:, None] < length
    carry = phi.init(len(tokens)), jnp.zeros(len(tokens), jnp.float32)
    (state, total), _ = jax.lax.scan(body, carry, (tokens.T, inside))
    return total + phi.final(state)


def agreement(tok: Tokenizer, num: int) -> dict[str, Any]:
    """Of random strings, how many are canonical, and how many `ppl.canonical` judges wrongly."""
    phi = ppl.canonical(tok).within(Space(tok.vocab_size, tok.eos, HORIZON))
    found = {"strings": 0, "own": 0, "wrongly let through": 0, "wrongly refused": 0}
    for seed in range(-(-num // BATCH)):
        batch = random_strings(tok, BATCH, seed)
        tokens = np.full((BATCH, HORIZON), tok.eos, np.int32)
        for row, x in zip(tokens, batch, strict=True):
            row[: len(x)] = x
        judged = np.asarray(log_phi(phi, tokens, np.array([len(x) for x in batch]))) == 0
        own = np.array([is_own(tok, x) for x in batch])
        found["strings"] += BATCH
        found["own"] += int(own.sum())
        found["wrongly let through"] += int((judged & ~own).sum())
        found["wrongly refused"] += int((own & ~judged).sum())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(phi)) / 1e6
    return found | {"states": int((phi.tables.distance < 1 << 30).sum()), "MB": round(size, 1)}


def is_own(tok: Tokenizer, x: list[int]) -> bool:
    text = tok.decode(x, skip_special_tokens=False)
    return tok.encode(text, add_special_tokens=False) == x


def draws(lm: ppl.LM, tok: Tokenizer, num: int) -> dict[str, float]:
    """The share of the model's own draws, of at most 64 tokens, that are their own segmentation."""
    shares = {}
    for prompt in PROMPTS:
        out = ancestral.run(
            jax.random.key(0), lm.given(tok.chat(prompt), max_tokens=64), num_samples=num
        )
        pairs = zip(out.sequences.tokens, out.sequences.length, strict=True)
        own = [is_own(tok, np.asarray(row[:n]).tolist()) for row, n in pairs]
        shares[prompt] = float(np.mean(own))
    return shares


def costs(lm: ppl.LM, tok: Tokenizer, rounds: int) -> None:
    """Prints how long a step takes with the own segmentation over the same without."""
    plain = lm.given(tok.chat(smc_overhead.PROMPT), max_tokens=smc_overhead.MAX_TOKENS)
    regex = functools.partial(ppl.regex, smc_overhead.SENTENCES, tok)
    targets = {
        "regex, all": plain * regex(canonical=False),
        "regex, own": plain * regex(canonical=True),
        "all": plain * ppl.regex(r"(?s:.)*", tok, canonical=False),
        "own": plain * ppl.canonical(tok),
    }
    for base, other in (("regex, all", "regex, own"), ("all", "own")):
        both = {label: functools.partial(_run, targets[label]) for label in (base, other)}
        times = turns.measure(both, rounds, smc_overhead.steps_of)
        turns.report(
            "canonical", times, f"N = {smc_overhead.NUM}, {smc_overhead.MAX_TOKENS} tokens"
        )


def _run(target: ppl.Target, key: jax.Array) -> Any:
    return smc.run(key, target, num_particles=smc_overhead.NUM)


def date(lm: ppl.LM, tok: Tokenizer) -> None:
    """Prints log Z of the README's target, four runs of independent particles each."""
    p = lm.given(tok.chat(PROMPTS[0]), max_tokens=24)
    for canonical in (False, True):
        for alpha in (1, 2, 4):
            target = p**alpha * ppl.regex(DATE, tok, canonical)
            found = [_log_z(target, seed) for seed in range(4)]
            shown = ", ".join(f"{log_z:.2f}" for log_z in found)
            label = "own" if canonical else "all"
            print(f"date, {label:3} alpha = {alpha}: log Z {shown} (spread {np.std(found):.2f})")


def _log_z(target: ppl.Target, seed: int) -> float:
    how: smc.Options = {"proposal": proposals.locally_optimal}
    return float(smc.run(jax.random.key(seed), target, num_particles=32, **how).log_z)


def main() -> None:
    """Print what is found, part by part; 0 leaves a part out."""
    parser = argparse.ArgumentParser(prog="python -m experiments.canonical")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--strings", type=int, default=100_000, help="random strings")
    parser.add_argument("--draws", type=int, default=64, help="draws for each prompt")
    parser.add_argument("--rounds", type=int, default=15, help="of the timings")
    args = parser.parse_args()
    compilation.use_cache()
    lm, tok = models.load(args.model)
    if args.strings:
        for name, tokenizer in ((args.model, tok), ("sentencepiece", trained())):
            print(name, agreement(tokenizer, args.strings))
    if args.draws:
        for prompt, share in draws(lm, tok, args.draws).items():
            print(f"{share:.3f} of the draws are their own segmentation: {prompt}")
    if args.rounds:
        costs(lm, tok, args.rounds)
        date(lm, tok)


if __name__ == "__main__":
    main()
