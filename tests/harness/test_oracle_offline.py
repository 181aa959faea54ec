"""`python -m harness judge`: two files, a band, a verdict; and the published format of the files."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
from made_answers import server
from made_band import made_band

from harness.cli import main
from harness.oracle.band import Band
from harness.transcript import SCHEMA_FILE, Step, Transcript, schema

NOISE = 1e-5
BASE = server(NOISE, 1)


@pytest.fixture
def files(tmp_path):
    """Saves transcripts under names; `files("cell", transcript)` returns the path as text."""

    def save(name: str, transcript: Transcript) -> str:
        path = tmp_path / "files" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        transcript.save(path)
        return str(path)

    return save


def judged(capsys, *words: str) -> tuple[int, str]:
    status = main(["judge", *words])
    said = capsys.readouterr()
    return status, said.out + said.err


def shifted(prompt, kind, step, logits):
    return logits * 1.01 if (prompt, step) == ("batch-2", 9) else logits


def test_right_answers_within_a_band_measured_on_the_spot(files, capsys, tmp_path):
    base, cell, again = files("base", BASE), files("cell", server(NOISE, 2)), files("tp1", server(NOISE, 3))
    status, said = judged(capsys, base, cell, "--null", again, "--save-band", str(tmp_path / "band.json"))
    assert status == 0 and said.startswith("pass: 432 steps agree")
    assert "null band measured now: 432 steps; false-alarm rate 0.01 a run of 1 cell" in said
    assert Band.load(tmp_path / "band.json").name == "measured now"
    status, said = judged(capsys, base, cell, "--band", str(tmp_path / "band.json"), "--cells", "40", "--rate", "0.05")
    assert status == 0 and "false-alarm rate 0.05 a run of 40 cells" in said


def test_wrong_answers_name_the_statistic_and_show_the_step(files, capsys):
    base, cell = files("base", BASE), files("cell", server(NOISE, 2, fault=shifted))
    status, said = judged(capsys, base, cell, "--null", files("tp1", server(NOISE, 3)))
    assert status == 1 and said.startswith("fail: decode: largest logprob change is")
    assert "✗ decode: largest logprob change" in said and "  prefill: largest logprob change" in said
    assert "prompt batch-2, step 9, position 51" in said


def test_json_holds_the_whole_judgement(files, capsys):
    base, cell = files("base", BASE), files("cell", server(NOISE, 2, fault=shifted))
    status, said = judged(capsys, base, cell, "--null", files("tp1", server(NOISE, 3)), "--format", "json")
    found = json.loads(said)
    assert status == 1 and (found["verdict"], found["agree"], found["forced"]) == ("fail", False, True)
    assert "decode: largest logprob change" in found["beyond"]
    assert {"name", "value", "bound", "n", "unit", "low", "high", "null", "note"} == set(found["statistics"][0])
    assert found["differences"][0]["prompt"] == "batch-2" and len(found["curve"]) == 4


def test_answers_that_chose_freely_are_unproven_at_best(files, capsys):
    base, cell = files("base", BASE), files("cell", server(NOISE, 2, forced=False))
    status, said = judged(capsys, base, cell, "--null", files("tp1", server(NOISE, 3)))
    assert status == 1 and said.startswith("unproven: 432 steps agree")
    wrong = files("wrong", server(NOISE, 2, forced=False, fault=shifted))
    assert judged(capsys, base, wrong, "--null", files("tp1", server(NOISE, 3)))[1].startswith("fail:")


def test_a_run_s_own_band_is_found_beside_its_cells(capsys, tmp_path):
    folder = tmp_path / "run" / "cells" / "a"
    folder.mkdir(parents=True)
    BASE.save(folder / "transcript.json")
    server(NOISE, 2).save(tmp_path / "cell.json")
    (tmp_path / "run" / "bands").mkdir()
    made_band(change=1e-6).save(tmp_path / "run" / "bands" / f"{BASE.cell_key}.json")
    status, said = judged(capsys, str(folder / "transcript.json"), str(tmp_path / "cell.json"))
    assert status == 1 and "bound 1e-06" in said and "null band made" in said


def test_the_shipped_band_is_chosen_by_dtype_and_model(files, capsys):
    base, cell = files("base", BASE), files("cell", server(NOISE, 2))
    assert "null band shipped for float32, made models" in judged(capsys, base, cell)[1]
    status, said = judged(capsys, base, cell, "--model", "org/some-model")
    assert status == 2 and "no null band for float32 and models of kind hub" in said and "--null" in said
    half = [files(name, server(NOISE, seed, dtype="float8")) for name, seed in (("a", 1), ("b", 2))]
    assert judged(capsys, *half)[0] == 2


def test_files_that_cannot_be_judged_are_bad_usage(files, capsys, tmp_path):
    base = files("base", BASE)
    assert judged(capsys, base, str(tmp_path / "none.json"))[0] == 2
    (tmp_path / "broken.json").write_text('{"schema_version": 1, "cell_id": 3}')
    status, said = judged(capsys, base, str(tmp_path / "broken.json"))
    assert status == 2 and "broken.json is no transcript" in said and "harness/schemas/transcript-v1.json" in said
    status, said = judged(capsys, base, files("other", server(NOISE, 2, workload="v")))
    assert status == 2 and "answered another workload" in said
    assert judged(capsys, base, files("cell", server(NOISE, 2)), "--band", base)[0] == 2
    status, said = judged(capsys, base, files("same", BASE), "--null", base)
    assert status == 2 and "only 0 null steps in which anything was reordered" in said


@pytest.mark.parametrize("words", [("--rate", "0"), ("--rate", "1"), ("--cells", "0")])
def test_impossible_rates_are_bad_usage(files, words):
    with pytest.raises(SystemExit) as stopped:
        main(["judge", files("base", BASE), files("cell", BASE), *words])
    assert stopped.value.code == 2


def test_no_number_survives_the_file_and_differs(files, capsys):
    broken = BASE.answers[0].steps[3]
    bad = Step(token_id=broken.token_id, logprob=math.nan, top={**broken.top, broken.token_id: math.nan})
    answer = BASE.answers[0].model_copy(update={"steps": (*BASE.answers[0].steps[:3], bad, *BASE.answers[0].steps[4:])})
    cell = files("cell", BASE.model_copy(update={"answers": (answer, *BASE.answers[1:])}))
    jsonschema.validate(json.loads(Path(cell).read_text()), json.loads(schema()))
    status, said = judged(capsys, files("base", BASE), cell, "--null", files("tp1", server(NOISE, 3)))
    assert status == 1 and "largest logprob change is no number (NaN or infinite), bound" in said


def test_the_published_schema_is_the_code_s():
    assert json.loads(SCHEMA_FILE.read_text()) == json.loads(schema()), "run python -m harness.transcript"
    jsonschema.validate(json.loads(BASE.model_dump_json()), json.loads(schema()))


def test_a_transcript_of_another_engine_needs_few_fields(tmp_path, capsys):
    """What the docs ask of another engine, written without our code."""

    def write(name: str, shift: float) -> str:
        rest = {str(token): -3.0 - token / 10 for token in range(10, 28)}
        steps = [{"token_id": 7, "logprob": -0.5, "top": {"7": -0.5, "9": -1.5 - shift, **rest}} for _ in range(4)]
        answers = [{
            "prompt": "one", "kind": "mine", "prompt_length": 12, "batch": 0, "forced": True, "steps": steps,
        }]  # fmt: skip
        made = {
            "schema_version": 1, "cell_id": f"my engine {name}", "cell_key": name, "workload_key": "my prompts",
            "dtype": "float32", "vocab_size": 32000, "top_k": 20, "answers": answers,
        }  # fmt: skip
        jsonschema.validate(made, json.loads(SCHEMA_FILE.read_text()))
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(made))
        return str(path)

    made_band(change=0.01, distance=0.1).save(tmp_path / "band.json")
    band = ["--band", str(tmp_path / "band.json")]
    assert judged(capsys, write("a", 0.0), write("b", 0.001), *band)[0] == 0
    assert judged(capsys, write("a", 0.0), write("b", 0.1), *band)[0] == 1
