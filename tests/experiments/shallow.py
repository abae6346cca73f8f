"""The first layers of SmolLM2 for the whole: its tokenizer and vocabulary, and programs that are
quick to compile, which all thirty are not.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import models
from models.config import DecoderConfig
from models.loading import load as whole
from models.tokenizer import Tokenizer
from ppl.lm import LM


def load(name: str) -> tuple[LM, Tokenizer]:
    """As `models.load`; for `models.load = shallow.load`."""
    lm, tok = whole(name)
    config, params = cast(DecoderConfig, lm.static), cast(dict[str, Any], lm.params)
    config = dataclasses.replace(config, layers=config.layers[:2])
    params = params | {"layers": params["layers"][:2]}
    return models.transformer.decoder(config, params, lm.eos), tok
