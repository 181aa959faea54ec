"""A tokenizer made on the spot: one word a token, so that any token id has a text and any text an id."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def words(vocab: int) -> list[str]:
    """The text of every token id."""
    return [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), vocab))]


def make_tokenizer(vocab: int) -> "Tokenizer":
    """A word-level tokenizer of `vocab` entries."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    table = {word: index for index, word in enumerate(words(vocab))}
    tokenizer = Tokenizer(WordLevel(vocab=table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_tokenizer(folder: Path, vocab: int, positions: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for the tokenizer of `vocab` entries."""
    make_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
