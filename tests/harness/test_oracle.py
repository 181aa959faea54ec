"""The comparison, with values worked out by hand, and the proof of path, claim by claim."""

import dataclasses
import math

import pytest
from made_band import made_band

from harness.cell import Cell, Mode
from harness.oracle.band import shipped
from harness.oracle.compare import Missing, compare, divergence, widest
from harness.oracle.judge import judge
from harness.oracle.proof import check_proof
from harness.transcript import Answer, Step, Transcript
from helix_runtime.proof import RankProof

BAND = made_band(change=0.01, distance=0.05)


def step(token: int, **top: float) -> Step:
    """`step(1, t1=-0.5, t2=-1.5)`."""
    values = {int(name[1:]): value for name, value in top.items()}
    return Step(token_id=token, logprob=values.get(token, -9.0), top=values)


def transcript(*answers: tuple[str, tuple[Step, ...]], workload: str = "w", forced: bool = False) -> Transcript:
    made = tuple(
        Answer(prompt=name, kind="boundary", prompt_length=5, batch=0, forced=forced, steps=steps)
        for name, steps in answers
    )
    return Transcript(
        cell_id="c", cell_key="k", workload_key=workload, dtype="float32", vocab_size=8, top_k=2, answers=made
    )


ONE = step(1, t1=-0.5, t2=-1.5)
TWO = step(2, t2=-0.1, t1=-3.0)


def value(judgement, name: str) -> float:
    return next(item.value for item in judgement.statistics if item.name == name)


def test_equal_answers_agree():
    found = judge(transcript(("p", (ONE, TWO))), transcript(("p", (ONE, TWO))), BAND)
    assert found.agree and "2 steps agree" in found.reason
    assert value(found, "prefill: largest logprob change") == 0
    assert value(found, "decode: same best token") == 1
    assert found.differences == ()


def test_changes_by_hand():
    a, b = step(1, t1=-0.5, t2=-1.5, t3=-2.0), step(1, t1=-0.6, t2=-1.25, t4=-1.75)
    # token 2 changed by 0.25; token 3 is not in b, whose floor is -1.75, so by 0 at least; token 4 is in b at -1.75,
    # a's floor is -2.0: by 0.25 at least
    assert widest(a, b) == pytest.approx(0.25)
    # KL over the tokens of a and the rest; token 3, which b does not list, is taken at b's floor, the most it can be.
    p, q = [math.exp(x) for x in (-0.5, -1.5, -2.0)], [math.exp(x) for x in (-0.6, -1.25, -1.75)]
    # p sums to 0.965, q to 1.009: of b nothing is left, and a rest below a thousandth is taken as one.
    pairs = [*zip(p, q, strict=True), (1 - sum(p), 1e-3)]
    wanted = sum(x * math.log(x / y) - x + y for x, y in pairs)
    assert divergence(a, b) == pytest.approx(wanted)


def test_prefill_and_decode_are_judged_apart():
    off = step(1, t1=-0.8, t2=-1.5)
    prefill = judge(transcript(("p", (ONE, TWO))), transcript(("p", (off, TWO))), BAND)
    assert not prefill.agree and prefill.reason.startswith("prefill: largest logprob change is 0.3 nat")
    worse = step(2, t2=-0.9, t1=-3.0)  # decode is further off, but the sentence is about prefill
    both = judge(transcript(("p", (ONE, TWO))), transcript(("p", (off, worse))), BAND)
    assert both.reason.endswith("most at step 0 of prompt p") and both.differences[0].step == 1
    decode = judge(transcript(("p", (TWO, ONE))), transcript(("p", (TWO, off))), BAND)
    assert not decode.agree and decode.reason.startswith("decode: largest logprob change")
    worst = decode.differences[0]
    assert (worst.prompt, worst.step, worst.position) == ("p", 1, 6)
    assert worst.baseline == ((1, -0.5), (2, -1.5)) and worst.candidate == ((1, -0.8), (2, -1.5))


def test_the_first_step_with_another_best_token_is_shown_beside_the_worst():
    near, turned, far = step(1, t1=-0.70, t2=-0.75), step(1, t1=-0.75, t2=-0.70), step(1, t1=-0.8, t2=-9.0)

    def shown(second: Step) -> list[int]:
        base, cell = transcript(("p", (ONE, near, *(ONE,) * 9))), transcript(("p", (ONE, second, *(far,) * 9)))
        return [one.step for one in judge(base, cell, BAND).differences]

    assert shown(near) == [2, 3, 4, 5, 6]
    assert shown(turned) == [2, 3, 4, 5, 1]


def test_a_lost_best_token_counts_only_beyond_the_margin():
    # 0.051 nat may change, so two tokens may trade places when they are at most 0.102 nat apart.
    wide = made_band(change=0.051, distance=9.0)
    near, turned = step(1, t1=-0.70, t2=-0.75), step(1, t1=-0.75, t2=-0.70)
    assert judge(transcript(("p", (near,))), transcript(("p", (turned,))), wide).agree
    clear, turned = step(1, t1=-0.5, t2=-1.5), step(1, t1=-1.5, t2=-0.5)
    found = judge(transcript(("p", (clear,))), transcript(("p", (turned,))), wide)
    assert "prefill: best token lost despite its margin" in found.beyond
    assert value(found, "prefill: worst rank of the baseline's best token") == 2


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((), "no answer"),
        ((("p", ()),), "no answer"),
        ((("p", (ONE,)),), "only 1 of 2 steps"),
        ((("p", (ONE, step(3, t3=-0.1, t1=-3.0))),), "only 1 of 2 steps"),
    ],
)
def test_missing_short_and_other_answers_differ(answers, said):
    found = judge(transcript(("p", (ONE, TWO))), transcript(*answers, forced=True), BAND)
    assert not found.agree and "missing answers" in found.reason and said in found.reason


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_no_number_differs(bad):
    broken = Step(token_id=1, logprob=bad, top={1: bad, 2: -1.5})
    found = judge(transcript(("p", (ONE, ONE))), transcript(("p", (ONE, broken))), BAND)
    assert not found.agree
    assert value(found, "decode: largest logprob change") == 9999
    assert all(math.isfinite(number) for _, number in found.differences[0].candidate)


def test_forced_steps_are_compared_on_the_same_tokens_only():
    other = step(3, t3=-0.1, t1=-3.0)
    found = compare(transcript(("p", (ONE, TWO, ONE))), transcript(("p", (ONE, other, ONE)), forced=True))
    assert [change.step for change in found.steps] == [0]
    assert found.missing == [Missing("p", "only 1 of 3 steps on the same tokens")]


def test_free_answers_are_compared_up_to_and_with_the_step_where_they_part():
    reference = transcript(("p", (ONE, step(1, t1=-0.7, t2=-0.75, t3=-4.0), ONE, TWO)))
    parted = step(2, t2=-0.72, t1=-0.74, t3=-4.1)
    # Step 2 has the same token as the reference's, but stands behind another one: it says nothing.
    found = compare(reference, transcript(("p", (ONE, parted, ONE, TWO))))
    assert found.missing == []
    assert [(change.step, change.position) for change in found.steps] == [(0, 5), (1, 6)]
    last = found.steps[1]
    assert last.change == pytest.approx(0.04)  # of token 1, the reference's: -0.7 and -0.74; not -0.7 and -0.72
    assert last.widest == pytest.approx(0.1)  # of token 3
    assert last.margin == pytest.approx(0.05) and not last.same_best


def test_free_answers_that_part_at_once_are_compared_at_prefill():
    found = compare(transcript(("p", (ONE, TWO))), transcript(("p", (TWO, ONE))))
    assert found.missing == [] and [change.step for change in found.steps] == [0]
    assert found.steps[0].change == pytest.approx(2.5)  # token 1: -0.5 and -3.0
    found = compare(transcript(("p", (ONE, TWO))), transcript(("p", (step(3, t3=-0.1, t2=-1.5), ONE))))
    assert found.steps[0].change == math.inf  # the reference's token is not in the candidate's list


def test_a_free_answer_that_stops_short_is_missing():
    found = compare(transcript(("p", (ONE, TWO, ONE))), transcript(("p", (ONE, TWO))))
    assert [change.step for change in found.steps] == [0, 1]
    assert found.missing == [Missing("p", "only 2 of 3 steps on the same tokens")]


def test_nothing_compared_is_no_agreement():
    assert not judge(transcript(), transcript(), BAND).agree


def test_other_workloads_are_not_compared():
    with pytest.raises(ValueError, match="another workload"):
        judge(transcript(("p", (ONE,))), transcript(("p", (ONE,)), workload="v"), BAND)
    with pytest.raises(ValueError, match="the band is for bfloat16"):
        judge(transcript(("p", (ONE,))), transcript(("p", (ONE,))), made_band(dtype="bfloat16"))


def test_an_unmeasured_dtype_has_no_band():
    assert shipped("float32", "recipe:llama-k4").dtype == "float32"
    with pytest.raises(KeyError, match=r"shipped: .*float32-made"):
        shipped("float8", "recipe:llama-k4")


CELL = Cell(
    mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=4, kvp=2, interleave=16
)


RAN = {
    "decode_attention": 9, "decode_combine": 9, "local_tokens": 50, "global_tokens": 100, "all_to_all": 9,
    "exchange_members": 18,
}  # fmt: skip


def proofs(**changes) -> list[RankProof]:
    """The right proof of `CELL`, with `changes` on rank 3."""
    made = [
        RankProof(
            rank=rank, tp=4, kvp=2, tpa=2, kvp_rank=rank % 2, tpa_rank=rank // 2, helix=True, backend="HELIX_CPU",
            impl="x.Impl", combine="a2a", combine_impl="f", group_size=2, group_ranks=(0, 1) if rank < 2 else (2, 3),
            interleave=16, lse_base="e", model_runner="r", vllm_version="0.32.0", self_test="ok",
            counters=RAN,
        )
        for rank in range(4)
    ]  # fmt: skip
    made[3] = dataclasses.replace(made[3], **changes)
    return made


def test_a_full_proof_is_accepted():
    assert check_proof(CELL, proofs()) is None
    assert check_proof(CELL.model_copy(update={"comm": "a2a"}), proofs()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tp": 8}, "TP was 8"),
        ({"kvp": 4}, "KVP was 4"),
        ({"tpa": 1}, "TPA was 1"),
        ({"backend": "CPU_ATTN"}, "backend was CPU_ATTN, the cell claims HELIX_CPU"),
        ({"vllm_version": "0.19.0"}, "vLLM version was 0.19.0"),
        ({"combine_impl": ""}, "combine's function was False"),
        ({"q_replicated": True}, "replication of queries was True, the cell claims False"),
        ({"helix": False}, "Helix was False"),
        ({"interleave": 1}, "interleave was 1"),
        ({"combine": "ag_rs"}, "combine was ag_rs"),
        ({"group_size": 4}, "group size was 4"),
        ({"group_ranks": (3,)}, "rank list was 1"),
        ({"impl": ""}, "does not name"),
        ({"self_test": "failed"}, "self-test was failed"),
        ({"counters": {"decode_attention": 0}}, "decode_attention is 0"),
        ({"counters": {"decode_attention": 1, "decode_combine": 0}}, "decode_combine is 0"),
        ({"counters": RAN | {"local_tokens": 49}}, "group [2, 3] owns 99 tokens, but 100 passed rank 2"),
        ({"counters": RAN | {"misplaced_tokens": 3}}, "3 tokens lie on another rank than the interleave names"),
        ({"counters": RAN | {"all_to_all": 0}}, "0 all_to_all exchanges ran where a2a makes 9"),
        ({"counters": RAN | {"all_gather": 9}}, "9 all_gather exchanges ran where a2a makes 0"),
        ({"counters": RAN | {"prefill_combine": 2}}, "9 all_to_all exchanges ran where a2a makes 11"),
        (
            {"counters": RAN | {"decode_combine": 1, "all_to_all": 1, "exchange_members": 2}},
            "1 combines ran for 9 decode attentions: some were not merged",
        ),
        ({"counters": RAN | {"exchange_members": 36}}, "36 members in all, not among 2 each"),
    ],
)
def test_each_claim_is_checked(changes, said):
    assert said in check_proof(CELL, proofs(**changes))


def test_a_combine_that_was_asked_for_by_name_must_not_be_another():
    fell = proofs(combine_impl="helix_runtime.combine.triton (fell back: direct: ranks share a GPU)")
    assert check_proof(CELL, fell) is None  # nobody asked: the record says what ran
    asked = CELL.model_copy(update={"helix": (("combine", "direct"),)})
    assert check_proof(asked, proofs()) is None
    assert "(fell back: direct: ranks share a GPU), the cell asks for another" in check_proof(asked, fell)


def test_an_overlap_that_was_asked_for_must_have_happened():
    asked = CELL.model_copy(update={"helix": (("overlap", 3),)})
    assert "no combine ran beside the next micro-batch's attention" in check_proof(asked, proofs())
    overlapped = [dataclasses.replace(proof, counters=RAN | {"overlapped_combine": 6}) for proof in proofs()]
    assert check_proof(asked, overlapped) is None
    off = CELL.model_copy(update={"helix": (("overlap", 1),)})
    assert check_proof(off, proofs()) is None


GRAPHS = {"cudagraph_mode": "FULL_AND_PIECEWISE", "graphs_captured": 5, "counters": RAN | {"replayed_combine": 9}}


@pytest.mark.parametrize(
    ("asked", "changes", "said"),
    [
        ("FULL", {}, None),  # vLLM's own step down from FULL still captures the decode
        ("PIECEWISE", {"cudagraph_mode": "PIECEWISE", "counters": RAN}, None),  # attention runs between the graphs
        ("NONE", {"cudagraph_mode": "NONE", "graphs_captured": 0, "counters": RAN}, None),
        ("FULL", {"cudagraph_mode": "PIECEWISE"}, "settled on CUDA graphs PIECEWISE, the cell asks for FULL"),
        ("PIECEWISE", {"cudagraph_mode": "NONE"}, "settled on CUDA graphs NONE"),
        ("PIECEWISE", {"cudagraph_mode": ""}, "settled on CUDA graphs unknown"),
        ("FULL", {"graphs_captured": 0}, "no CUDA graph was captured"),
        ("FULL_DECODE_ONLY", {"counters": RAN}, "no combine ran in a replay of a CUDA graph"),
    ],
)
def test_a_cell_about_cuda_graphs_must_have_replayed_them(asked, changes, said):
    cell = CELL.model_copy(update={"serve": (("compilation-config.cudagraph_mode", asked),)})
    every = [dataclasses.replace(proof, **GRAPHS) for proof in proofs()]
    every[3] = dataclasses.replace(every[3], **changes)
    found = check_proof(cell, every)
    assert found is None if said is None else said in found


def test_a_rank_that_must_hold_tokens_and_holds_none_is_named():
    """Interleave 16: the second rank of a group holds a token from a length of 17 on."""
    uneven = [
        dataclasses.replace(proof, counters=RAN | {"local_tokens": 100 if proof.kvp_rank == 0 else 0})
        for proof in (dataclasses.replace(made, kvp_rank=made.rank % 2) for made in proofs())
    ]
    assert check_proof(CELL, uneven, longest=16) is None
    said = check_proof(CELL, uneven, longest=17)
    assert said == "rank 1 holds no token, though a sequence had 17: others hold its share"


def test_replicated_queries_must_have_been_replicated():
    asks = CELL.model_copy(update={"serve": (("dcp-q-replicate", True),)})
    assert "rank 0: replication of queries was False" in check_proof(asks, proofs())
    assert check_proof(asks, [dataclasses.replace(proof, q_replicated=True) for proof in proofs()]) is None


def test_a_rank_without_proof_is_named():
    assert check_proof(CELL, proofs()[:3]) == "no proof of path from rank 3 of 4"
    assert check_proof(CELL, []) == "no proof of path from rank 0, 1, 2, 3 of 4"


def test_the_default_combine_is_vllms_for_standard_dcp():
    cell = CELL.model_copy(update={"mode": Mode.STANDARD_DCP})
    ran = RAN | {"all_to_all": 0, "all_gather": 9, "reduce_scatter": 9, "exchange_members": 36}
    standard = [dataclasses.replace(proof, helix=False, combine="ag_rs", counters=ran) for proof in proofs()]
    assert check_proof(cell, standard) is None
    assert "combine was ag_rs, the cell claims a2a" in check_proof(cell.model_copy(update={"comm": "a2a"}), standard)
