"""The text of the tokens at which answers differ, by the model's own tokenizer.

It is recorded when a cell is judged: a report is drawn from the ledger alone, where the model may not be.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from harness.models.recipe import PREFIX, find
from harness.models.tokenizer import make_tokenizer
from harness.result import Difference

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def with_texts(differences: Sequence[Difference], model: str) -> tuple[Difference, ...]:
    """`differences` with the text of each token that they list; without, where `model`'s tokenizer is not here."""
    found = _tokenizer(model) if differences else None
    if found is None:
        return tuple(differences)
    return tuple(one.model_copy(update={"texts": _texts(one, found)}) for one in differences)


@lru_cache(maxsize=2)
def _tokenizer(model: str) -> "Tokenizer | None":
    """A recipe's is made anew, a hub model's read from the hub's cache on this machine: nothing is fetched for it."""
    try:
        if model.startswith(PREFIX):
            return make_tokenizer(find(model).vocab)
        from huggingface_hub import try_to_load_from_cache
        from tokenizers import Tokenizer

        path = try_to_load_from_cache(model, "tokenizer.json")
        return Tokenizer.from_file(path) if isinstance(path, str) else None
    except Exception:  # a damaged file, say, raises nothing narrower; ids alone are shown then
        return None


def _texts(difference: Difference, found: "Tokenizer") -> tuple[tuple[int, str], ...]:
    tokens = dict.fromkeys(token for token, _ in (*difference.baseline, *difference.candidate))
    texts = ((token, _text(found, token)) for token in tokens)
    return tuple((token, text) for token, text in texts if text is not None)


def _text(found: "Tokenizer", token: int) -> str | None:
    """A token that is only a part of a letter as the vocabulary writes it; None for one that it does not have."""
    piece = found.id_to_token(token) if 0 <= token < 2**32 else None
    if piece is None:
        return None
    text = found.decode([token], skip_special_tokens=False)
    return piece if not text or "\ufffd" in text else text
