"""Cards of models: measured once a recipe, kept, recorded with the run, and drawn."""

from pathlib import Path

import pytest
from test_runner import BASE, HELIX, good, planned, play

from harness import ledger
from harness.models import sheet
from harness.models.sheet import Measure, ModelCard, card_of
from harness.report import write
from harness.report.run import load
from harness.run import record_cards


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def named(card: ModelCard) -> dict[str, Measure]:
    return {measure.name: measure for measure in (*card.margins, *card.sensitivity)}


def test_a_retrieval_model_is_far_from_rounding_and_loses_its_answer_with_its_shard(cache, monkeypatch):
    monkeypatch.setattr(sheet, "LENGTHS", (100,))
    monkeypatch.setattr(sheet, "LONG", 2000)
    found = named(card_of("recipe:llama-retrieve-k2"))
    for dtype in ("float32", "bfloat16"):
        margin = found[f"smallest margin, {dtype}, 100 tokens"]
        assert margin.value > 10 * found[f"rounding against fp64, {dtype}, 100 tokens"].value
        assert margin.note.startswith("3 of 3 right")
    long = found["smallest margin, float32, 2000 tokens"]
    assert long.value > 2 and long.note.startswith("2 of 2 right")
    for kvp, at in ((2, "KVP 2, interleave 1"), (4, "KVP 4, interleave 16")):
        masked = [found[f"rank {rank}'s shard masked, with the answer in it, {at}"] for rank in range(kvp)]
        assert all(one.value > 4 and one.note == "100% of the answers change" for one in masked)
        assert f"rank {kvp}'s shard masked, with the answer in it, {at}" not in found
        assert 0.1 < found[f"another shard masked, {at}"].value < min(one.value for one in masked)


def test_a_card_is_measured_once(cache, monkeypatch):
    first = card_of("recipe:llama-k1")
    assert "one KV" not in first.shape and "1 KV heads" in first.shape
    assert named(first)["one shard of two masked, smallest"].value > 1
    monkeypatch.setattr(sheet, "_random", lambda made: pytest.fail("measured again"))
    assert card_of("llama-k1") == first
    damaged = next((cache / "cards").iterdir())
    damaged.write_text("{")
    monkeypatch.setattr(sheet, "_random", lambda made: first)
    assert card_of("llama-k1") == first and damaged.read_text() != "{"


def test_a_run_records_the_cards_of_models_that_answered_and_the_page_shows_them(cache, tmp_path, monkeypatch):
    made = ModelCard(
        model="recipe:llama-k4",
        shape="8 <heads>",
        kind="random",
        margins=(Measure(name="smallest margin", value=2.5, unit="nat"),),
        sensitivity=(Measure(name="a shard masked", value=6.25, unit="nat", note="100% change"),),
    )
    monkeypatch.setattr(sheet, "card_of", lambda model: made)
    folder = tmp_path / "run"
    results, _ = play(folder, [planned(BASE), planned(HELIX)], answers={cell: good(cell) for cell in (BASE, HELIX)})
    record_cards(folder, results)
    assert load(folder).models == (made,) and not load(folder).left_out
    page = write(folder).read_text()
    assert "8 &lt;heads&gt;" in page and "a shard masked" in page and "6.25" in page
    assert '"models":[{"model":"recipe:llama-k4"' in (folder / "results.json").read_text()


def test_a_card_that_cannot_be_measured_costs_no_run(tmp_path, monkeypatch, capsys):
    def broken(model):
        raise ValueError("no such thing")

    monkeypatch.setattr(sheet, "card_of", broken)
    results, _ = play(tmp_path, [planned(BASE)], answers={BASE: good(BASE)})
    record_cards(tmp_path, results)
    assert "no card of recipe:llama-k4: ValueError: no such thing" in capsys.readouterr().out
    assert not [event for event in ledger.read(tmp_path / ledger.NAME)[0] if event["event"] == "models"]
