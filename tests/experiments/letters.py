"""A tokenizer for the tabular models of `tests.helpers`."""

from __future__ import annotations

import numpy as np

from tests import helpers


class Letters:
    """Tokens are `a`, a dot, `b` and a dollar sign."""

    eos, vocab_size = helpers.EOS, helpers.VOCAB_SIZE
    token_bytes = (b"a", None, b"b", b"$")

    def decode(self, ids: object) -> str:
        return "".join("a.b$"[int(token)] for token in np.asarray(ids))
