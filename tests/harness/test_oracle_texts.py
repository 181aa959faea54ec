"""The text of tokens beside their ids: from a made model's tokenizer, from the hub's cache, or not at all."""

import json

import pytest
from huggingface_hub import constants
from test_runner import BASE, HELIX, good, planned, play, transcript
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from harness.ledger import read
from harness.oracle.judge import Judgement
from harness.oracle.offline import as_text
from harness.oracle.texts import _tokenizer, with_texts
from harness.result import CellResult, Difference
from harness.verdict import Verdict

HUB = "org/model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; `cache(text)` puts a `tokenizer.json` for HUB there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _tokenizer.cache_clear()

    def put(text: str) -> None:
        folder = tmp_path / "hub" / "models--org--model"
        for name, content in (("refs/main", "abc"), ("snapshots/abc/tokenizer.json", text)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)

    yield put
    _tokenizer.cache_clear()


def difference(*tokens: int) -> Difference:
    listed = tuple((token, -1.0) for token in tokens)
    return Difference(prompt="p", step=1, position=9, baseline=listed, candidate=listed[::-1])


def texts(model: str, *tokens: int) -> dict[int, str]:
    (found,) = with_texts([difference(*tokens)], model)
    return dict(found.texts)


def byte_level() -> str:
    vocabulary = {"the": 0, "Ġthe": 1, "ä": 2, "½ł": 3, "ä½ł": 4, "Ċ": 5}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return made.to_str()


def test_a_made_model_says_its_words_and_its_special_tokens():
    assert texts("recipe:llama-k4", 271, 2, 271) == {271: "w271", 2: "</s>"}


def test_a_hub_model_says_its_text_and_of_half_a_letter_what_its_vocabulary_writes(cache):
    cache(byte_level())
    assert texts(HUB, 0, 1, 2, 4, 5, 6) == {0: "the", 1: " the", 2: "ä", 4: "你", 5: "\n", 6: "<|end|>"}


def test_tokens_that_the_vocabulary_does_not_have_stay_ids():
    assert texts("recipe:llama-k4", 512, -1, 2**70, 5) == {5: "w5"}


@pytest.mark.parametrize("model", ["recipe:nobody-made-it", HUB, "no hub id at all"])
def test_without_a_tokenizer_ids_stand_alone(model):
    assert with_texts([difference(1)], model) == (difference(1),)


def test_a_damaged_tokenizer_is_none(cache):
    cache('{"model": ')
    assert texts(HUB, 0) == {}


def test_a_cell_that_differs_is_recorded_with_texts_and_one_that_agrees_without_differences(tmp_path):
    wrong = good(HELIX, transcript=transcript(HELIX, shift=0.2))
    base, found = play(tmp_path, [planned(BASE), planned(HELIX)], answers={HELIX: wrong})[0]
    assert found.verdict is Verdict.FAIL and base.differences == ()
    assert dict(found.differences[0].texts) == {1: "<s>", 2: "</s>"}
    (kept,) = (event for event in read(tmp_path / "ledger.ndjson")[0] if "fail" in json.dumps(event.get("result", "")))
    assert CellResult.model_validate(kept["result"]).differences == found.differences


def test_a_record_from_before_there_were_texts_is_read():
    old = difference(1).model_dump(mode="json")
    del old["texts"]
    assert Difference.model_validate(old) == difference(1)


def test_a_terminal_shows_hostile_text_as_text():
    hostile = difference(1, 2).model_copy(update={"texts": ((1, 'a"\x1b[2J\n\x9b1m\u202e'), (2, "long" * 99))})
    said = as_text(Verdict.FAIL, Judgement(agree=False, reason="r", differences=(hostile,)))
    (line,) = (line for line in said.split("\n") if line.startswith("  baseline"))
    assert line == f'  baseline   1 "a\\"\\u001b[2J\\n�1m�": -1.00000  2 "{("long" * 99)[:23]}…": -1.00000'
