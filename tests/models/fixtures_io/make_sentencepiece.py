"""Writes sentencepiece.json: a vocabulary that sentencepiece trained on the licence text, and its
ids for varied texts.

Run in an environment with the package sentencepiece (the project itself does not need it):

    python tests/models/fixtures_io/make_sentencepiece.py
"""

import json
import pathlib
import random
import tempfile

import sentencepiece

HERE = pathlib.Path(__file__).parent
TEXTS = [
    "Hello world",
    "  leading and   multiple spaces  ",
    "Unicode: Zürich, naïve, 東京, Привет, العربية, 한국어, 🎉👩‍👩‍👧 ☃ ½",
    "1234567890 3.14159 2024-01-31",
    "def f(x):\n\treturn x**2  # comment\n\n\nprint(f(10))\r\n",
    "the License shall terminate as of the date such litigation is filed.",
    "",
    "\x01\x7f\u200b",
]


def main() -> None:
    """Train, encode, write."""
    random.seed(0)
    letters = [*map(chr, range(32, 300)), *"漢字🎉\n\t  "]
    texts = TEXTS + ["".join(random.choices(letters, k=25)) for _ in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            input=str(HERE.parents[2] / "LICENSE"),
            model_prefix=f"{folder}/model",
            vocab_size=420,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=["<turn>"],
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/model.model")
    pieces = range(model.get_piece_size())
    kinds = {
        index: 3 if model.is_control(index) else 6 if model.is_byte(index) else 1
        for index in pieces
    }
    kinds |= {model.unk_id(): 2, model.piece_to_id("<turn>"): 4}
    fixture = {
        "tokens": [model.id_to_piece(index) for index in pieces],
        "scores": [model.get_score(index) for index in pieces],
        "types": [kinds[index] for index in pieces],
        "texts": texts,
        "ids": [model.encode(text) for text in texts],
    }
    (HERE / "sentencepiece.json").write_text(json.dumps(fixture, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
