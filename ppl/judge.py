"""Language models as judges: the log-odds of yes against no after reading a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .checks import check_count, check_prompt
from .lm import LM, Prefix
from .potential import State
from .pytrees import register_dataclass
from .scorers import Scorer
from .space import Space, bound


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Judge(Scorer):
    """Scores a text by logit(yes) - logit(no) after before + text + after; state = the model's
    cache.
    """

    lm: LM
    prefix: Prefix
    after: Int[Array, " A"]
    yes: int = dataclasses.field(metadata={"static": True})
    no: int = dataclasses.field(metadata={"static": True})
    space: Space | None = dataclasses.field(default=None, metadata={"static": True})

    def within(self, space: Space) -> Judge:
        if self.lm.vocab_size != space.vocab_size:
            raise ValueError(
                f"expected a judge with the target's vocabulary of {space.vocab_size} tokens, got"
                f" one of {self.lm.vocab_size}; use a model with the same tokenizer, or ppl.python"
                " with the judge inside"
            )
        length = self.prefix.length
        if self.lm.context is not None and not isinstance(length, Tracer):
            total = int(length) + space.max_tokens + self.after.shape[0]
            if total > self.lm.context:
                raise ValueError(
                    "expected before, text and after within the judge's context of"
                    f" {self.lm.context} tokens, got {int(length)} + {space.max_tokens} +"
                    f" {self.after.shape[0]}; shorten them or lower max_tokens"
                )
        return dataclasses.replace(self, space=space)

    @property
    def tokens_read(self) -> tuple[int, int]:
        return 1, self.after.shape[0]

    def init(self, num: int) -> State:
        return self.lm.init(
            self.prefix, num, bound(self.space, "a judge").max_tokens + self.after.shape[0]
        )

    def push(self, state: State, token: Int[Array, " N"], used: Int[Array, " N"]) -> State:
        cache, _ = self.lm.step(self.prefix, state, token)
        return self.lm.truncate(cache, used + (token != bound(self.space, "a judge").eos))

    def score(
        self, state: State, used: Int[Array, " N"], needed: Bool[Array, " N"]
    ) -> Float[Array, " N"]:
        num, size = used.shape[0], self.after.shape[0]
        after, last = jnp.broadcast_to(self.after, (num, size)), jnp.full(num, size - 1, jnp.int32)
        # The cache with the question in it is dropped: the text goes on from `state`.
        _, logits = self.lm.logits_at(self.prefix, state, after, last)
        return logits[:, self.yes] - logits[:, self.no]


def judge(
    lm: LM,
    before: Sequence[int] | Int[Array, " S"],
    after: Sequence[int] | Int[Array, " A"],
    *,
    yes: int,
    no: int,
) -> Judge:
    """A language model's verdict as a log-score: the log-odds of `yes` against `no` after before +
    text + after.

    log s(x) = log p(yes | before x after) - log p(no | before x after), where p may be another
    model than the target's, with the same vocabulary.  It goes wherever a log-score goes:

        verdict = ppl.judge(lm, encode("Problem: ... Solution: "), encode(" Is it right?"),
        yes=id_of_yes, no=id_of_no) target * ppl.step_scores(verdict, ppl.Steps(delimiters=[13]))

    The judge reads each token once, as it is drawn, and the A tokens of `after` at step boundaries
    and ends only.

    Args:
        lm: the judge.
        before: token ids [S], S >= 1.
        after: token ids [A], A >= 1.
        yes, no: the ids of the two answers.

    Raises:
        ValueError: if `before` or `after` is empty or too long, an id is outside [0, V), yes is no,
            or (when bound to a target) the vocabularies differ or the texts do not fit into the
            judge's context.
    """
    check_count("the number of tokens after the text", len(after))
    ids = jnp.asarray(check_prompt(after, lm.vocab_size, lm.context), jnp.int32)
    answers = np.asarray([yes, no])
    if yes == no or (answers < 0).any() or (answers >= lm.vocab_size).any():
        raise ValueError(
            f"expected two different token ids in [0, {lm.vocab_size}) for yes and no, got {yes}"
            f" and {no}; encode the"
            " answers with the judge's tokenizer, as they come after a space or at a line's start"
        )
    return Judge(lm, lm.prefill(before), ids, int(yes), int(no))
