"""Baselines are compared too: the TP1 chain in plan and run, and what a baseline that agrees, parts or differs is."""

import pytest
from made_band import made_band
from test_matrix import CPU, hopper, suite
from test_runner import failed, good, play, transcript

import harness.cell
from harness.cell import Cell, Mode
from harness.frozen import content_hash
from harness.matrix import ANEW, PlannedCell, baseline_of, expand, select
from harness.observe import asked_twice, observe
from harness.server.log import Cause
from harness.suite import load_all
from harness.transcript import Answer, Step, Transcript
from harness.verdict import Verdict
from harness.workload import workload_of

TP1 = "cpu/standard-tp/CPU_ATTN/llama-k4/tp1/no-enable-prefix-caching=True/workload=standard@4"
TP4 = "cpu/standard-tp/CPU_ATTN/llama-k4/tp4"
HELIX = "cpu/helix-gqa/HELIX_CPU/llama-k4/tp4-dcp2"


def chain(plan: list[PlannedCell]) -> list[tuple[str, str | None]]:
    return [(item.cell.id, item.baseline.id if item.baseline else None) for item in plan]


def test_the_chain_ends_at_tp1_which_stands_first():
    assert chain(expand([suite(comm="a2a")], [CPU])) == [(TP1, None), (TP4, TP1), (f"{HELIX}/a2a/i1", TP4)]


def test_a_reference_is_stock_on_one_rank_and_reads_nothing_that_it_wrote_earlier():
    own = {"seed": 3, "max-num-batched-tokens": 128, "num-gpu-blocks-override": 30, "block-size": 16}
    reference, base, _ = (item.cell for item in expand([suite(serve=own)], [CPU]))
    assert base.serve == tuple(own.items())
    serve = (("seed", 3), ("block-size", 16), ("no-enable-prefix-caching", True))
    assert reference == base.model_copy(update={"tp": 1, "workload": "standard@4", "serve": serve})
    assert reference.key != base.key
    command = reference.command("m")
    assert command[command.index("--tensor-parallel-size") + 1] == "1" and "--helix-mode" not in command


def test_each_baseline_has_one_reference_and_each_tp_its_own():
    plan = expand(
        [suite(interleave=[1, 16], layout=[{"tp": 4, "dcp": 2}, {"tp": 8, "dcp": 4}], model="recipe:llama-k4")], [CPU]
    )
    at8 = [id.replace("tp4", "tp8").replace("@4", "@8").replace("dcp2", "dcp4") for id in (TP1, TP4, HELIX)]
    assert chain(plan) == [
        (TP1, None),
        (TP4, TP1),
        (f"{HELIX}/i1", TP4),
        (f"{HELIX}/i16", TP4),
        (at8[0], None),
        (at8[1], at8[0]),
        (f"{at8[2]}/i1", at8[1]),
        (f"{at8[2]}/i16", at8[1]),
    ]


def test_suites_that_share_a_baseline_share_its_reference():
    standard = suite("tp", mode="standard-tp", backend="CPU_ATTN", layout={"tp": 4})
    for suites, asked in (([standard, suite("helix")], ("tp", "helix")), ([suite("helix"), standard], ("helix", "tp"))):
        plan = expand(suites, [CPU])
        assert chain(plan) == [(TP1, None), (TP4, TP1), (f"{HELIX}/i1", TP4)]
        assert [item.suites for item in plan] == [asked, asked, ("helix",)]


def test_an_asked_tp1_cell_is_another_than_the_reference():
    """TP1 on its own is asked the prompts of TP1; the reference of TP4 those of TP4."""
    plan = expand([suite(mode="standard-tp", backend="CPU_ATTN", layout=[{"tp": 1}, {"tp": 4}])], [CPU])
    assert chain(plan) == [("cpu/standard-tp/CPU_ATTN/llama-k4/tp1", None), (TP1, None), (TP4, TP1)]


def test_hub_models_and_tp1_are_compared_with_nothing():
    group = {"hardware": "hopper", "backend": "FLASH_ATTN", "model": "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"}
    group["serve"] = {"enforce-eager": True}
    base, item = expand([suite(**group)], [hopper(8)])
    assert (base.cell.tp, base.baseline, item.baseline) == (4, None, base.cell)
    for fields in ({"tp": 4, "model": "org/model"}, {"tp": 1, "model": "recipe:llama-k4"}):
        assert baseline_of(Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", **fields)) is None


def test_what_is_expected_of_a_baseline_is_not_expected_of_its_reference():
    standard = suite(mode="standard-tp", backend="CPU_ATTN", layout={"tp": 4}, expect="xfail", why="a known defect")
    reference, base = expand([standard], [CPU])
    assert (base.declared, base.declared_why) == (Verdict.XFAIL, "a known defect")
    assert reference.declared is Verdict.PASS and reference.cell.expect is None


def test_options_of_dcp_are_none_of_a_baseline():
    """So the cells with and without one share the chain."""
    plan = expand([suite(serve={"dcp-q-replicate": [None, True], "seed": 3})], [CPU])
    assert [item.cell.serve for item in plan] == [
        (("seed", 3), ANEW), (("seed", 3),), (("seed", 3),), (("dcp-q-replicate", True), ("seed", 3))
    ]  # fmt: skip
    assert plan[2].baseline == plan[3].baseline == plan[1].cell


def test_stock_vllm_is_told_its_backend_on_cpu_and_the_plugin_is_not():
    reference, base, item = expand([suite(mode="helix-mla", backend="HELIX_CPU_MLA", model="recipe:deepseek-v2",
                                          layout={"tp": 4, "dcp": 4})], [CPU])  # fmt: skip
    for stock in (reference, base):
        told = stock.cell.serve_args()
        assert told[told.index("--attention-backend") + 1] == "CPU_MLA"
    assert "--attention-backend" not in item.cell.serve_args()


def test_a_refused_cell_brings_no_chain():
    (item,) = expand([suite(layout={"tp": 4, "dcp": 4})], [CPU])
    assert item.declared is Verdict.REJECTED and item.baseline is None


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        (f"{HELIX}/i16", [TP1, TP4, f"{HELIX}/i16"]),
        (TP4, [TP1, TP4]),
        (TP1, [TP1]),
        ("*/llama-k4/tp4-*", [TP1, TP4, f"{HELIX}/i1", f"{HELIX}/i16"]),
        ("*/llama-k2/tp2-*", ["cpu/helix-gqa/HELIX_CPU/llama-k2/tp2-dcp2/i1"]),  # a refusal
    ],
)
def test_selection_takes_the_whole_chain_along(glob, wanted):
    refused = suite("other", model="recipe:llama-k2", layout={"tp": 2, "dcp": 2})
    plan = expand([suite(interleave=[1, 16]), refused], [CPU])
    assert [item.cell.id for item in select(plan, [glob])] == wanted


def test_ten_thousand_cells_of_one_baseline_are_hashed_once_each(monkeypatch):
    """What makes a plan slow is hashing; shared baselines and references must not be hashed once a dependent."""
    hashed = []
    monkeypatch.setattr(harness.cell, "content_hash", lambda value: hashed.append(1) or content_hash(value))
    plan = expand([suite(helix={"a": list(range(100)), "b": list(range(100))})], [CPU])
    assert len(plan) == 10_002
    assert [item.cell.id for item in plan[:2]] == [TP1, TP4]
    assert {item.baseline for item in plan[2:]} == {plan[1].cell}
    assert len(hashed) == 10_002


def test_committed_baselines_of_recipes_have_their_reference_before_them():
    plan = expand(load_all(), [CPU])
    place = {item.cell.key: index for index, item in enumerate(plan)}
    compared = [item for item in plan if item.cell.baseline and item.baseline]
    assert len({item.baseline.key for item in compared}) == len(compared)
    for index, item in enumerate(plan):
        if item.baseline:
            assert place[item.baseline.key] < index
        if item.cell.baseline and item.declared is Verdict.PASS:
            chained = item.cell.model.startswith("recipe:") and item.cell.tp > 1
            assert (item.baseline is not None) is chained, item.cell.id
            if chained:
                named = item.cell.workload if "@" in item.cell.workload else f"{item.cell.workload}@{item.cell.tp}"
                assert (item.baseline.tp, item.baseline.workload) == (1, named)


# What a baseline's answers say. The band: 5e-4 nat, so a margin of 1e-3.

BASE = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=4)
REFERENCE = baseline_of(BASE)
ITEM = PlannedCell(cell=BASE, suites=("s",), declared=Verdict.PASS, declared_why="w", baseline=REFERENCE)


def free(*steps: Step, cell: Cell = BASE) -> Transcript:
    """A transcript of one prompt of three tokens, answered with free choice."""
    answer = Answer(prompt="p", kind="long", prompt_length=3, batch=0, forced=False, steps=steps)
    return transcript(cell).model_copy(update={"answers": (answer,)})


def step(one: float, two: float) -> Step:
    """The likelier of tokens 1 and 2 is chosen."""
    return Step(token_id=1 if one >= two else 2, logprob=max(one, two), top={1: one, 2: two, 3: -5.0})


def seen(reference: Transcript, answers: Transcript):
    return observe(ITEM, good(BASE, transcript=answers), reference, made_band())


def test_a_baseline_that_says_what_tp1_says_passes():
    found = seen(free(step(-0.5, -1.5), step(-0.25, -2.0)), free(step(-0.5, -1.5), step(-0.25, -2.0001)))
    assert found.verdict is Verdict.PASS
    assert found.reason == (
        "the reference: 1 prompts, 2 steps; against TP1, 2 steps agree; largest logprob change 0.0001 nat, bound 0.0005"
    )
    assert found.judgement.agree


def test_a_baseline_that_says_something_else_fails():
    found = seen(free(step(-0.5, -1.5), step(-0.25, -2.0)), free(step(-0.5, -1.5), step(-0.25, -2.125)))
    assert found.verdict is Verdict.FAIL
    assert found.reason == (
        "standard TP itself differs from TP1: decode: largest logprob change is 0.125 nat, bound 0.0005; "
        "most at step 1 of prompt p"
    )
    assert [(one.prompt, one.step) for one in found.judgement.differences] == [("p", 1), ("p", 0)]


def test_a_baseline_that_parts_at_a_near_tie_passes_on_what_is_comparable():
    tie, turned, other = step(-0.70001, -0.70004), step(-0.70004, -0.70001), step(-3.0, -0.1)
    found = seen(free(step(-0.5, -1.5), tie, step(-0.5, -1.5)), free(step(-0.5, -1.5), turned, other))
    assert found.verdict is Verdict.PASS
    assert "1 prompts, 3 steps; against TP1, 2 steps agree; largest logprob change 3e-05 nat" in found.reason
    statistics = {item.name: item for item in found.judgement.statistics}
    assert statistics["missing answers"].value == 0
    assert statistics["decode: largest logprob change"].n == 1
    assert statistics["decode: mean change of the imposed token"].value == pytest.approx(3e-5)
    assert statistics["decode: best token lost despite its margin"].value == 0
    assert statistics["decode: same best token"].value == 0


def test_a_baseline_that_parts_at_a_clear_choice_fails():
    found = seen(free(step(-0.5, -1.5)), free(step(-1.5, -0.5)))
    assert found.verdict is Verdict.FAIL
    assert "prefill: largest logprob change is 1 nat" in found.reason
    lost = next(item for item in found.judgement.statistics if item.name.endswith("despite its margin"))
    assert (lost.value, lost.note) == (1, "p step 0, margin 1")


def test_a_baseline_that_was_silent_or_refused_is_no_comparison():
    silent = seen(free(step(-0.5, -1.5)), free())
    assert (silent.verdict, silent.reason) == (Verdict.ERROR, "no answer to 1 prompts, the first is p")
    died = observe(ITEM, failed(BASE, Cause.OUT_OF_MEMORY, "no memory"), free(step(-0.5, -1.5)), made_band())
    assert died.verdict is Verdict.ERROR and died.judgement is None
    other = free(step(-0.5, -1.5)).model_copy(update={"workload_key": "another"})
    assert seen(free(step(-0.5, -1.5)), other).verdict is Verdict.ERROR


def test_the_reference_itself_is_compared_with_nothing():
    item = ITEM.model_copy(update={"cell": REFERENCE, "baseline": None})
    found = observe(item, good(REFERENCE, transcript=free(step(-0.5, -1.5), cell=REFERENCE)), None)
    assert (found.verdict, found.reason, found.judgement) == (Verdict.PASS, "the reference: 1 prompts, 1 steps", None)


def test_a_baseline_that_errs_in_a_single_step_when_it_is_asked_again_is_no_reference():
    """Seen on FLASHINFER: one step of 520, in one answer of two; a median or a mean does not show it."""

    def asked(*last: float):
        return asked_twice(right, first, free(*usual[: -len(last)], *(step(-0.25, end) for end in last)), made_band())

    usual = [step(-0.25, -2.0)] * 12
    first = free(*usual)
    right = seen(first, first)
    assert asked(-2.0001) is right
    found = asked(-2.125)
    assert (found.verdict, found.reason) == (
        Verdict.FAIL,
        "standard TP, asked again in other batches, differs from itself: decode: largest logprob change is 0.125 nat, "
        "bound 0.0005; most at step 11 of prompt p",
    )
    # A model that is louder than those of the band: many steps change alike, none stands out.
    assert asked(*(-2.0 - 0.125 * part for part in (0.3, 0.5, 0.2, 0.6, 0.4, 1.0))) is right
    other = first.model_copy(update={"workload_key": "another"})
    assert asked_twice(right, first, other, made_band()).verdict is Verdict.ERROR
    unknown = asked_twice(right, first, first, None)
    assert unknown.verdict is Verdict.PASS and unknown.reason.endswith("not compared: no band from elsewhere")


# The chain in a run.


def chained() -> tuple[list[PlannedCell], list[Cell]]:
    plan = expand([suite(layout={"tp": 2, "dcp": 2}, helix={"allow_gqa_tpa1": True})], [CPU])
    return plan, [item.cell for item in plan]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_goes_from_tp1_up_and_forces_only_what_can_be_forced(tmp_path, jobs):
    plan, (reference, base, helix) = chained()
    found, table = play(tmp_path, plan, jobs)
    assert table.ran == [(reference, False, True), (base, False, True), (helix, True, True)]
    assert [result.verdict for result in found] == [Verdict.PASS] * 3
    assert [result.baseline_id for result in found] == [None, reference.id, base.id]
    assert found[0].statistics == () and found[1].statistics[0].name == "missing answers"
    assert "against TP1, 2 steps agree; largest logprob change 0 nat, bound" in found[1].reason


def test_a_baseline_that_differs_from_tp1_is_no_reference(tmp_path):
    plan, (_, base, helix) = chained()
    off = good(base, transcript=transcript(base, shift=0.3))
    found, table = play(tmp_path, plan, answers={base: off})
    assert [result.verdict for result in found] == [Verdict.PASS, Verdict.FAIL, Verdict.ERROR]
    assert found[1].reason.startswith("standard TP itself differs from TP1: prefill: largest logprob change is 0.3 nat")
    assert found[2].reason == f"its baseline {base.id} gave no reference: {found[1].reason}"
    assert helix not in [cell for cell, _, _ in table.ran]
    assert [result.localisation for result in found] == ["", "", ""]  # a baseline has no merge to trace


def test_a_lost_reference_is_the_error_of_the_whole_chain(tmp_path):
    plan, (reference, *_) = chained()
    found, table = play(tmp_path, plan, answers={reference: failed(reference, Cause.OUT_OF_MEMORY, "no memory")})
    assert [result.verdict for result in found] == [Verdict.ERROR] * 3
    assert [cell for cell, _, _ in table.ran] == [reference]
    assert reference.id in found[1].reason and "no memory" in found[2].reason


def test_a_layout_that_standard_tp_lacks_is_compared_with_the_largest_below():
    """Six KV heads: Helix can shard them over four ranks as TPA 2, standard TP over three at most."""
    plan = expand([suite(model="recipe:llama-k6", layout={"tp": 4, "dcp": 2})], [CPU])
    assert [(item.cell.tp, item.cell.workload, item.skip) for item in plan] == [
        (1, "standard@4", None), (3, "standard@4", None), (4, "standard", None)
    ]  # fmt: skip
    assert chain(plan)[-1] == (plan[2].cell.id, plan[1].cell.id)
    assert "compared with standard TP on 3 ranks: TP=4 and 6 KV heads" in plan[2].declared_why


def test_six_ranks_on_cpu_are_compared_with_three_which_stock_collectives_take():
    plan = expand([suite(model="recipe:llama-k6", layout={"tp": 6, "dcp": 3})], [CPU])
    assert [item.cell.tp for item in plan] == [1, 3, 6] and not any(item.skip for item in plan)
    assert "2, 3, 4, 8 ranks, not 6" in plan[2].declared_why
    shape, vocab = (plan[2].cell, plan[1].cell), 576
    assert len({workload_of(cell, vocab, 2048).key for cell in shape}) == 1
    asked = expand([suite(mode="standard-tp", backend="CPU_ATTN", model="recipe:llama-k6", layout={"tp": 6})], [CPU])
    assert "standard TP has no such layout" in asked[-1].skip
