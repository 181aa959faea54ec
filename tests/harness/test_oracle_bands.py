"""The null bands of a run: measured from its baselines, saved in its folder, and told in every judged row."""

import pytest
from made_answers import server
from test_baselines import chained
from test_runner import good, play

from harness.cell import Cell, Mode
from harness.oracle.band import Band, shipped
from harness.oracle.bands import BATCH, TP_SIZE, Bands
from harness.verdict import Verdict

NOISE = 4e-6  # as large as what the shipped band was measured from
#: A hub model in bf16 on a GPU: nothing is shipped for it.
GPU = Cell(mode=Mode.STANDARD_TP, backend="FLASH_ATTN", hardware="hopper", model="org/model", tp=8)


def answers(cell: Cell, seed: int, noise: float = NOISE, dtype: str = "float32"):
    made = server(noise, seed, cell=cell.id, forced=not cell.baseline, dtype=dtype)
    return good(cell, transcript=made.model_copy(update={"cell_key": cell.key}))


def test_a_run_measures_its_band_from_tp1_and_says_so(tmp_path):
    plan, (reference, base, helix) = chained()
    found, _ = play(
        tmp_path, plan, answers={reference: answers(reference, 1), base: answers(base, 2), helix: answers(helix, 3)}
    )
    assert [result.verdict for result in found] == [Verdict.PASS] * 3
    band = Band.load(tmp_path / "bands" / f"{base.key}.json")
    assert [(source.kind, source.used) for source in band.sources] == [("tp size", True)]
    assert f"null band of this run ({base.model}, float32, TP2)" in found[2].band
    assert "false-alarm rate 0.01 a run of 2 cells" in found[2].band  # the baseline against TP1, and Helix
    assert "null band shipped for float32, made models" in found[1].band
    bounds = {item.name: item.bound for item in found[2].statistics}
    assert bounds["decode: largest logprob change"] == pytest.approx(
        band.decode.change.bound(0.01 / 2 / 2 / 7, 18 * 23, band.spread.cell)
    )  # a run's rate, by two cells, half for what single steps do, of which there are seven statistics
    assert found[2].curve and found[2].curve[0].null is not None and found[1].curve
    assert any(phase.name == "judge" for phase in found[2].phases)


def test_a_louder_cell_fails_by_the_run_s_own_band_where_the_shipped_one_is_wider(tmp_path):
    """Noise of 1e-6 in standard TP and 5e-6 in the cell: five times the null, though within what is shipped."""
    plan, (reference, base, helix) = chained()
    quiet = {reference: answers(reference, 1, 1e-6), base: answers(base, 2, 1e-6)}
    found, _ = play(tmp_path, plan, answers={**quiet, helix: answers(helix, 3, 5e-6)})
    assert found[2].verdict is Verdict.FAIL
    largest = next(item for item in found[2].statistics if item.name == "decode: largest logprob change")
    assert largest.value > largest.bound
    assert largest.value < shipped("float32", "recipe:llama-k4").decode.change.bound(0.01 / 16, 18 * 23)


def test_tokens_that_were_not_imposed_leave_a_cell_unproven_and_a_difference_fails_it(tmp_path):
    plan, (reference, base, helix) = chained()
    stock = {reference: answers(reference, 1), base: answers(base, 2)}

    def free(made):
        unforced = tuple(answer.model_copy(update={"forced": False}) for answer in made.transcript.answers)
        return made._replace(transcript=made.transcript.model_copy(update={"answers": unforced}))

    found, _ = play(tmp_path / "right", plan, answers={**stock, helix: free(answers(helix, 3))})
    assert found[2].verdict is Verdict.UNPROVEN
    found, _ = play(tmp_path / "wrong", plan, answers={**stock, helix: free(answers(helix, 3, 0.1))})
    assert found[2].verdict is Verdict.FAIL


def test_without_tp1_the_band_comes_from_other_batches(tmp_path):
    bands = Bands(tmp_path)
    assert bands.of(GPU) is None
    first, again = (answers(GPU, seed, 0.05, "bfloat16").transcript for seed in (1, 2))
    bands.add(GPU, BATCH, first, again)
    assert [source.kind for source in bands.of(GPU).sources] == ["batch composition"]
    assert (tmp_path / f"{GPU.key}.json").is_file() and GPU.key not in bands.problems


def test_identical_batches_are_no_band_and_the_reason_is_kept(tmp_path):
    bands = Bands(tmp_path / "bands")
    first = answers(GPU, 1, 0.05, "bfloat16").transcript
    bands.add(GPU, BATCH, first, first)
    assert bands.of(GPU) is None and "batch composition 100% identical" in bands.problems[GPU.key]
    assert not (tmp_path / "bands").exists()
    bands.add(GPU, TP_SIZE, first, answers(GPU, 2, 0.05, "bfloat16").transcript)
    assert [(source.kind, source.used) for source in bands.of(GPU).sources] == [(BATCH, False), (TP_SIZE, True)]
