"""Conformance kits: run them on your own language model, potential or tokenizer before trusting
what a sampler makes of it.

    check_lm(lm, prompt, key=jax.random.key(0))
    check_any_order(lm, prompt, length=L, key=jax.random.key(0))
    check_potential(potential, vocab_size=V, eos=eos, max_tokens=T, key=jax.random.key(0))
    check_tokenizer(tokenizer, key=jax.random.key(0))

They compare an object with its own definition (a cached step with a full pass, a look-ahead with a
step, bytes with decoded text) on random strings, and raise an AssertionError that says which law
does not hold and where.
"""

from .any_orders import check_any_order
from .lms import check_lm
from .potentials import check_potential
from .spellings import check_tokenizer

__all__ = ["check_any_order", "check_lm", "check_potential", "check_tokenizer"]
