"""Right servers compared with each other: which pairs, by which band, and how alarms are counted."""

import pytest
from made_answers import PROMPTS, server

from harness.oracle.alarms import RATES, main, table, told
from harness.oracle.clean import clean_comparisons
from harness.oracle.saved import find, pairs
from harness.oracle.ship import measured, ships
from harness.transcript import Transcript

NOISE = 1e-5
FEW = PROMPTS[::3]


def name(mode: str, tp: str) -> str:
    return f"cpu/{mode}/X/llama-k4/{tp}/workload=smoke"


@pytest.fixture
def folder(tmp_path):
    """A baseline, standard TP at two other sizes, the baseline again, Helix, a faulty one, and one of another model."""

    def save(start: str, cell: str, seed: int, noise: float = NOISE, **changes) -> None:
        for index in range(2):
            (tmp_path / start).mkdir(exist_ok=True)
            made = server(noise, 10 * seed + index, cell=cell, workload=f"set {index}", prompts=FEW, **changes)
            made.save(tmp_path / start / f"set-{index}.json")

    save("base", name("standard-tp", "tp4"), 1, forced=False)
    save("tp1", name("standard-tp", "tp1"), 2)
    save("tp2", name("standard-tp", "tp2"), 3)
    save("helix", name("helix-gqa", "tp4-dcp2"), 4)
    save("broken", name("helix-gqa", "tp4-dcp2") + "/fault=x", 5, noise=1.0)
    save("stranger", "cpu/helix-gqa/X/qwen3-k4/tp4-dcp2", 6)
    for index in range(2):
        again = Transcript.load(tmp_path / "base" / f"set-{index}.json")
        (tmp_path / "again").mkdir(exist_ok=True)
        again.model_copy(update={"cell_id": again.cell_id + "/again"}).save(tmp_path / "again" / f"set-{index}.json")
    (tmp_path / "base" / "workload-0.json").write_text("{}")  # no transcript, and not looked at
    return tmp_path


def clean(folder):
    return [item for item in find([folder]) if not item.fault]


def test_what_a_file_is_comes_from_its_cell_id(folder):
    found = {item.path.parent.name: item for item in find([folder])}
    helix = found["helix"]
    assert (helix.mode, helix.model, helix.tp, helix.fault) == ("helix-gqa", "llama-k4", 4, False)
    assert found["broken"].fault and found["tp2"].tp == 2
    assert len(find([folder])) == 14


def test_only_the_same_tokens_of_the_same_model_are_paired(folder):
    found = {(a.path.parent.name, b.path.parent.name) for a, b in pairs(clean(folder))}
    standard = {"base", "again", "tp1", "tp2"}
    assert found == {(a, b) for a in standard for b in standard | {"helix"} if a != b}
    other = server(NOISE, 99, cell=name("helix-gqa", "tp4-dcp2"), workload="set 0", prompts=FEW)
    turned = other.answers[0].steps[0].model_copy(update={"token_id": 63})
    answer = other.answers[0].model_copy(update={"steps": (turned, *other.answers[0].steps[1:])})
    other.model_copy(update={"answers": (answer, *other.answers[1:])}).save(folder / "helix" / "set-0.json")
    assert len([pair for pair in pairs(clean(folder)) if pair[1].mode == "helix-gqa"]) == 4  # of set 1 only


def test_no_comparison_is_judged_by_a_band_it_is_part_of(folder):
    for item in clean_comparisons(clean(folder)):
        (source,) = item.band.sources
        assert source.baseline == item.first.transcript.cell_id
        assert source.candidate != item.second.transcript.cell_id
        assert (f"/tp{item.first.tp}/" in source.candidate) is False  # of another TP size
    names = [
        (c.first.path.parent.name, c.second.path.parent.name, c.first.path.name)
        for c in clean_comparisons(clean(folder))
    ]
    assert len(names) == len(set(names)) == 2 * (4 + 6)  # Helix with each of four, and every two of the four once


def test_alarms_are_counted_at_every_rate(folder):
    made = table(clean(folder))
    assert made.identical == 2  # the baseline and itself again
    assert [rate.stated for rate in made.rates] == list(RATES) and {rate.n for rate in made.rates} == {18}
    assert made.rates[-1].alarms == 0
    assert made.rates[-1].upper == pytest.approx(1 - 0.05 ** (1 / 18))
    # The baseline and its twin chose freely; each is followed by TP1, TP2 and Helix in two sets: 2 * (3 + 3), of which
    # those with TP1 are judged by the band of TP2.
    assert made.starts == 5 and {rate.n for rate in made.as_run} == {12}
    groups = {group.name: group.n for group in made.groups}
    assert groups == {
        "float32, llama-k4, standard-tp : helix-gqa": 8, "float32, llama-k4, standard-tp : standard-tp": 10,
    }  # fmt: skip
    assert "18 comparisons of 12 transcripts" in told(made)


def test_a_wrong_server_among_them_is_an_alarm(folder, capsys):
    loud = [Transcript.load(folder / "broken" / f"set-{index}.json") for index in range(2)]
    for index, transcript in enumerate(loud):
        transcript.model_copy(update={"cell_id": name("helix-gqa", "tp4-dcp4")}).save(
            folder / "broken" / f"set-{index}.json"
        )
    made = table(clean(folder))
    assert made.rates[-1].alarms == 10  # with each of four of standard TP and with Helix, in two sets
    rare = [alarm for alarm in made.alarms if alarm.rate == RATES[-1]]
    assert all(name("helix-gqa", "tp4-dcp4") in (alarm.baseline, alarm.candidate) for alarm in rare)
    assert main([str(folder), "--json", str(folder / "table.out")]) == 0
    assert type(made).model_validate_json((folder / "table.out").read_text()) == made
    assert "Alarms at 1% and below:" in capsys.readouterr().out


def test_a_candidate_that_did_not_answer_all_is_an_alarm_and_no_reference(folder):
    """Helix without an answer to one prompt, and TP1 that stops short in another: each in one of two sets."""
    before = table(clean(folder))
    helix = Transcript.load(folder / "helix" / "set-0.json")
    silent = helix.answers[0].model_copy(update={"steps": ()})
    helix.model_copy(update={"answers": (silent, *helix.answers[1:])}).save(folder / "helix" / "set-0.json")
    tp2 = Transcript.load(folder / "tp2" / "set-1.json")
    short = tp2.answers[1].model_copy(update={"steps": tp2.answers[1].steps[:9]})
    tp2.model_copy(update={"answers": (tp2.answers[0], short, *tp2.answers[2:])}).save(folder / "tp2" / "set-1.json")
    made = table(clean(folder))
    assert made.as_run[0].n == before.as_run[0].n
    struck = {(alarm.candidate, alarm.rate) for alarm in made.alarms if "missing answers" in alarm.beyond}
    assert struck >= {(name("helix-gqa", "tp4-dcp2"), RATES[-1]), (name("standard-tp", "tp2"), RATES[-1])}
    assert all("missing answers" in alarm.beyond for alarm in made.alarms if alarm.rate == RATES[-1])
    silent = [item for item in clean(folder) if not item.complete]
    assert len(silent) == 1 and not any(first.key == silent[0].key for first, _ in pairs(clean(folder)))


def test_what_is_held_out_is_of_models_that_no_shipped_band_knows(folder):
    """All of the folder is of llama-k4 in fp32, with which a band is shipped; another's weights are not."""
    assert table(clean(folder)).held_out[0].n == 0
    for path in folder.rglob("set-*.json"):
        made = Transcript.load(path)
        made.model_copy(update={"cell_id": made.cell_id.replace("/llama-k4/", "/llama-k4-seed9/")}).save(path)
    made = table(clean(folder))
    assert made.held_out == made.as_run and made.held_out[0].n == 12
    assert "12 are of models that no shipped band was measured with" in told(made)
    assert not any(ships(item) for item in clean(folder) if item.model == "llama-k4-seed9")


def test_shipped_bands_come_from_standard_tp_alone(folder):
    (band,) = measured(clean(folder))
    assert (band.dtype, band.model, band.workload_key) == ("float32", "kind made", "")
    assert {source.candidate for source in band.sources} == {name("standard-tp", "tp1")}
    assert {source.baseline for source in band.sources} == {
        name("standard-tp", "tp4"), name("standard-tp", "tp4") + "/again", name("standard-tp", "tp2"),
    }  # fmt: skip
    assert all(source.prompts == 2 * len(FEW) and source.used for source in band.sources)
    assert band.decode.rows == band.decode.curve == ()
    assert 0 < band.spread.group < band.spread.cell + 0.2 < 0.4 and band.spread.degrees >= 4
