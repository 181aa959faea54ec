"""The scheduler and the verdicts, on an executor that answers from a table."""

import dataclasses
import threading
from pathlib import Path

import pytest

from harness.cell import Cell, Mode
from harness.executors.local import Attempt
from harness.ledger import read, results
from harness.matrix import PlannedCell
from harness.observe import SELF_TEST
from harness.runner import folder_name, run
from harness.server.log import Cause, Failure
from harness.transcript import Answer, Counts, Step, Transcript
from harness.verdict import Verdict
from helix_runtime.proof import RankProof

BASE = Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=2)
HELIX = Cell(mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=2, kvp=2)
OTHER = HELIX.model_copy(update={"interleave": 16})


def planned(cell: Cell, declared: Verdict = Verdict.PASS, **fields) -> PlannedCell:
    base = None if cell.baseline or declared is Verdict.REJECTED else BASE
    return PlannedCell(**{
        "cell": cell, "suites": ("s",), "declared": declared, "declared_why": "w", "baseline": base, **fields
    })  # fmt: skip


def transcript(cell: Cell, shift: float = 0.0, steps: int = 2) -> Transcript:
    step = Step(token_id=1, logprob=-0.5 - shift, top={1: -0.5 - shift, 2: -1.5})
    answer = Answer(prompt="p", kind="long", prompt_length=3, batch=0, forced=not cell.baseline, steps=(step,) * steps)
    return Transcript(
        cell_id=cell.id, cell_key=cell.key, workload_key="w", dtype="float32", vocab_size=8, top_k=2, answers=(answer,)
    )


def proofs(cell: Cell) -> tuple[RankProof, ...]:
    return tuple(
        RankProof(
            rank=rank, tp=2, kvp=2, tpa=1, kvp_rank=rank, tpa_rank=0, helix=True, backend=cell.backend,
            impl="i", combine="a2a", combine_impl="f", group_size=2, group_ranks=(0, 1), interleave=cell.interleave,
            lse_base="e",
            model_runner="r", vllm_version=cell.vllm_version, self_test="ok",
            counters={
                "decode_attention": 1, "decode_combine": 1, "local_tokens": 5, "global_tokens": 10, "all_to_all": 1,
                "exchange_members": 2,
            },
        )
        for rank in range(2)
    )  # fmt: skip


def good(cell: Cell, **changes) -> Attempt:
    made = Attempt(True, None, transcript(cell), () if cell.baseline else proofs(cell), 4096, "tail", ())
    return made._replace(**changes)


def failed(cell: Cell, cause: Cause, reason: str, started: bool = False) -> Attempt:
    return Attempt(started, Failure(cause=cause, reason=reason, log_tail=reason), None, (), None, "tail", ())


class Table:
    """Answers with an Attempt or raises, by cell key; notes what was run."""

    def __init__(self, **changes):
        self.answers = changes.pop("answers", {})
        self.cancel = threading.Event()
        self.ran: list[tuple[Cell, bool, bool]] = []
        self.killed = False

    def reserve(self, cell: Cell, ask: bool = True) -> bool:
        return True

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt:
        self.ran.append((cell, follow is not None, ask))
        answer = self.answers.get(cell.key, good(cell))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def give_back(self) -> None:
        pass

    def end_all(self) -> None:
        self.killed = True


def play(tmp_path, plan, jobs=1, **answers) -> tuple[list, Table]:
    table = Table(answers={cell.key: answer for cell, answer in answers.get("answers", {}).items()})
    return run(plan, run_dir=tmp_path, jobs=jobs, progress=lambda line: None, executor=table), table


def verdict_of(tmp_path, item: PlannedCell, attempt: Attempt | BaseException):
    found, _ = play(tmp_path, [planned(BASE), item], answers={item.cell: attempt})
    return found[1].verdict, found[1].reason


@pytest.mark.parametrize("jobs", [1, 3])
def test_baselines_run_first_and_cells_follow_them(tmp_path, jobs):
    found, table = play(tmp_path, [planned(HELIX), planned(BASE), planned(OTHER)], jobs)
    assert [result.cell for result in found] == [HELIX, BASE, OTHER]
    assert [result.verdict for result in found] == [Verdict.PASS] * 3
    assert table.ran[0] == (BASE, False, True)
    assert {(cell, follows) for cell, follows, _ in table.ran[1:]} == {(HELIX, True), (OTHER, True)}
    events, warnings = read(tmp_path / "ledger.ndjson")
    assert warnings == [] and {result.cell.id for result in results(events)} == {HELIX.id, BASE.id, OTHER.id}
    assert events[0]["planned"] == [HELIX.id, BASE.id, OTHER.id] and events[-1]["event"] == "run-end"
    assert found[0].baseline_id == BASE.id and found[0].kv_cache_tokens == 4096 and len(found[0].proof) == 2


def test_with_several_jobs_what_takes_one_core_goes_first(tmp_path):
    one = BASE.model_copy(update={"tp": 1})
    plan = [planned(BASE), planned(HELIX), planned(OTHER, Verdict.REJECTED), planned(one)]
    for jobs, first in ((1, {BASE}), (2, {one, OTHER})):
        _, table = play(tmp_path / str(jobs), plan, jobs)
        assert {cell for cell, _, _ in table.ran[: len(first)]} == first


def test_what_has_waited_long_is_found_behind_any_number_that_wait_for_it(tmp_path):
    """Seen on two GPUs: a refusal that wanted a whole one waited behind a dozen baselines, and these for it."""
    plan = [planned(BASE)] + [planned(HELIX.model_copy(update={"interleave": 2**step})) for step in range(12)]

    class OneWaits(Table):
        def reserve(self, cell: Cell, ask: bool = True) -> bool | None:
            waited, self.asked = plan[-1].cell, getattr(self, "asked", 0) + 1
            assert self.asked < 1000, "it is never reached"
            return True if cell in (BASE, waited) or waited in [ran for ran, _, _ in self.ran] else None

    table = OneWaits()
    found = run(plan, run_dir=tmp_path, jobs=1, progress=lambda line: None, executor=table)
    assert [result.verdict for result in found] == [Verdict.PASS] * 13 and table.ran[1][0] == plan[-1].cell


def test_a_failed_baseline_is_the_error_of_its_dependents(tmp_path):
    broken = failed(BASE, Cause.OUT_OF_MEMORY, "no memory")
    found, table = play(tmp_path, [planned(BASE), planned(HELIX)], answers={BASE: broken})
    assert [result.verdict for result in found] == [Verdict.ERROR, Verdict.ERROR]
    assert "gave no reference" in found[1].reason and "no memory" in found[1].reason
    assert len(table.ran) == 1


def test_a_baseline_with_silent_prompts_is_no_reference(tmp_path):
    silent = good(BASE, transcript=transcript(BASE, steps=0))
    found, _ = play(tmp_path, [planned(BASE), planned(HELIX)], answers={BASE: silent})
    assert [result.verdict for result in found] == [Verdict.ERROR, Verdict.ERROR]


def test_a_baseline_outside_the_plan_is_said(tmp_path):
    found, _ = play(tmp_path, [planned(HELIX)])
    assert found[0].verdict is Verdict.ERROR and "not among the cells" in found[0].reason


def test_one_exception_is_one_row(tmp_path):
    found, _ = play(tmp_path, [planned(BASE), planned(HELIX), planned(OTHER)], answers={HELIX: OSError("disk")})
    assert [result.verdict for result in found] == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]
    assert "OSError: disk" in found[1].reason


def test_skipped_cells_are_rows_and_start_nothing(tmp_path):
    found, table = play(tmp_path, [planned(BASE, skip="no GPU"), planned(HELIX, skip="no GPU")])
    assert [(result.verdict, result.reason) for result in found] == [(Verdict.SKIP, "no GPU")] * 2
    assert table.ran == []


def test_other_answers_fail_and_known_ones_are_xfail(tmp_path):
    off = good(HELIX, transcript=transcript(HELIX, shift=0.3))
    verdict, reason = verdict_of(tmp_path / "a", planned(HELIX), off)
    assert verdict is Verdict.FAIL and "largest logprob change is 0.3" in reason
    assert verdict_of(tmp_path / "b", planned(HELIX, Verdict.XFAIL), off)[0] is Verdict.XFAIL
    assert verdict_of(tmp_path / "c", planned(HELIX, Verdict.XFAIL), good(HELIX))[0] is Verdict.XPASS


def test_a_repeated_prompt_must_have_read_the_cache_on_every_rank(tmp_path):
    def asked_twice(cell: Cell) -> Transcript:
        once = transcript(cell)
        again = once.answers[0].model_copy(update={"prompt": "q", "kind": "repeat"})
        return once.model_copy(update={"answers": (*once.answers, again)})

    def seen(cell: Cell, folder: str, reads: tuple[int, int]):
        found = [dataclasses.replace(proof, counters={**proof.counters, "context_prefill": count})
                 for proof, count in zip(proofs(cell), reads, strict=True)]  # fmt: skip
        answers = {BASE: good(BASE, transcript=asked_twice(BASE)),
                   cell: good(cell, transcript=asked_twice(cell), proofs=tuple(found))}  # fmt: skip
        results, _ = play(tmp_path / folder, [planned(BASE), planned(cell)], answers=answers)
        return results[1]

    assert seen(HELIX, "both", (2, 3)).verdict is Verdict.PASS
    one = seen(HELIX, "one", (2, 0))
    assert one.verdict is Verdict.UNPROVEN and "rank 1: a prompt was asked twice" in one.reason
    off = HELIX.model_copy(update={"serve": (("no-enable-prefix-caching", True),)})
    assert seen(off, "off", (0, 0)).verdict is Verdict.PASS


def test_a_prompt_of_one_token_must_have_left_a_shard_empty(tmp_path):
    def seen(folder: str, length: int, counts: tuple[int, int]):
        found = [dataclasses.replace(proof, counters={**proof.counters, "empty_shard": count})
                 for proof, count in zip(proofs(HELIX), counts, strict=True)]  # fmt: skip
        asked = {}
        for cell in (BASE, HELIX):
            said = transcript(cell)
            answers = tuple(answer.model_copy(update={"prompt_length": length}) for answer in said.answers)
            asked[cell] = good(cell, transcript=said.model_copy(update={"answers": answers}))
        asked[HELIX] = asked[HELIX]._replace(proofs=tuple(found))
        results, _ = play(tmp_path / folder, [planned(BASE), planned(HELIX)], answers=asked)
        return results[1]

    assert seen("counted", 1, (0, 3)).verdict is Verdict.PASS
    assert seen("longer", 2, (0, 0)).verdict is Verdict.PASS
    none = seen("none", 1, (0, 0))
    assert none.verdict is Verdict.UNPROVEN and "no rank counted an empty shard" in none.reason


@pytest.mark.parametrize(
    ("preempted", "verdict", "said"),
    [
        (2, Verdict.PASS, ""),
        (0, Verdict.UNPROVEN, "no request was preempted"),
        (None, Verdict.UNPROVEN, "does not count"),
    ],
)
def test_a_small_cache_must_have_preempted_someone(tmp_path, preempted, verdict, said):
    small = HELIX.model_copy(update={"serve": (("num-gpu-blocks-override", 18),)})
    counts = None if preempted is None else Counts(generated=2, cached=0, preempted=preempted)
    counted = transcript(small).model_copy(update={"counts": counts})
    seen, reason = verdict_of(tmp_path, planned(small), good(small, transcript=counted))
    assert seen is verdict and said in reason


def test_equal_answers_without_proof_are_unproven(tmp_path):
    verdict, reason = verdict_of(tmp_path, planned(HELIX), good(HELIX, proofs=proofs(HELIX)[:1]))
    assert verdict is Verdict.UNPROVEN and "no proof of path from rank 1" in reason


RULE = "TPA = 1 for GQA"


@pytest.mark.parametrize(
    ("attempt", "refusal", "verdict"),
    [
        (failed(HELIX, Cause.REFUSED, f"x: {RULE}"), RULE, Verdict.REJECTED),
        (failed(HELIX, Cause.REFUSED, "any rule"), None, Verdict.REJECTED),
        (failed(HELIX, Cause.OTHER, f"stock says {RULE}"), RULE, Verdict.REJECTED),
        (failed(HELIX, Cause.REFUSED, "another rule"), RULE, Verdict.FAIL),
        (failed(HELIX, Cause.OUT_OF_MEMORY, "no memory"), RULE, Verdict.ERROR),
        (failed(HELIX, Cause.OTHER, "crash"), None, Verdict.ERROR),
        (good(HELIX, transcript=None), RULE, Verdict.FAIL),
    ],
)
def test_declared_refusals(tmp_path, attempt, refusal, verdict):
    item = planned(HELIX, Verdict.REJECTED, refusal=refusal)
    found, table = play(tmp_path, [item], answers={HELIX: attempt})
    assert found[0].verdict is verdict
    assert table.ran == [(HELIX, False, False)]  # without a baseline, and never asked


def test_a_refusal_that_nobody_declared_is_rejected_and_differs(tmp_path):
    found, _ = play(
        tmp_path, [planned(BASE), planned(HELIX)], answers={HELIX: failed(HELIX, Cause.REFUSED, "the rule")}
    )
    assert found[1].verdict is Verdict.REJECTED and found[1].effect == "differs"


def test_a_self_test_that_failed_is_no_refusal_but_a_failure(tmp_path):
    said = "self-test of the a2a exchange failed on rank 1 (KVP rank 1 of 2): the merge of known partials is off by 3"
    verdict, reason = verdict_of(tmp_path, planned(HELIX), failed(HELIX, Cause.REFUSED, said))
    assert verdict is Verdict.FAIL and reason == said
    fault = planned(HELIX.model_copy(update={"fault": "drop-shard"}), Verdict.FAIL)
    found, _ = play(
        tmp_path / "fault", [planned(BASE), fault], answers={fault.cell: failed(HELIX, Cause.REFUSED, said)}
    )
    assert found[1].effect == "ok"  # caught


def test_the_words_of_the_self_test_are_those_that_the_verdict_looks_for():
    from helix_runtime.vllm_plugin import self_test

    assert SELF_TEST in Path(self_test.__file__).read_text()


def test_a_crash_at_start_is_infrastructure(tmp_path):
    verdict, reason = verdict_of(tmp_path, planned(HELIX), failed(HELIX, Cause.OTHER, "boom"))
    assert verdict is Verdict.ERROR and "at start" in reason and "boom" in reason


def test_a_baseline_that_stopped_short_is_no_reference(tmp_path):
    """Two of nine tokens; one of nine with eight that nobody waited for is all that was asked."""
    made = transcript(BASE)
    short = made.answers[0].model_copy(update={"asked": 9})
    found, _ = play(tmp_path, [planned(BASE), planned(HELIX)],
                    answers={BASE: good(BASE, transcript=made.model_copy(update={"answers": (short,)}))})  # fmt: skip
    assert [result.verdict for result in found] == [Verdict.ERROR, Verdict.ERROR]
    assert found[0].reason == "1 prompts got fewer tokens than were asked for; the first is p: 2 of 9"
    hung_up = short.model_copy(update={"waived": 7})
    found, _ = play(tmp_path / "waived", [planned(BASE)],
                    answers={BASE: good(BASE, transcript=made.model_copy(update={"answers": (hung_up,)}))})  # fmt: skip
    assert found[0].verdict is Verdict.PASS


def test_ctrl_c_cancels_and_leaves_finished_rows(tmp_path):
    class Interrupting(Table):
        def attempt(self, cell, folder, follow, ask=True):
            if cell == HELIX:
                import _thread

                _thread.interrupt_main()
                assert self.cancel.wait(20)
                return failed(cell, Cause.INTERRUPTED, "interrupted")
            return super().attempt(cell, folder, follow, ask)

    with pytest.raises(KeyboardInterrupt):
        plan = [planned(BASE), planned(HELIX), planned(OTHER)]
        run(plan, run_dir=tmp_path, progress=lambda line: None, executor=Interrupting())
    events, _ = read(tmp_path / "ledger.ndjson")
    assert [result.cell for result in results(events)] == [BASE]
    assert events[-1]["event"] == "run-end"


def test_an_unknown_runtime_is_refused(tmp_path):
    with pytest.raises(ValueError, match="allowed: process, docker"):
        run([planned(BASE)], run_dir=tmp_path, runtime="podman", executor=Table())


def test_folders_are_flat_and_apart():
    assert "/" not in folder_name(HELIX)
    assert folder_name(HELIX) != folder_name(HELIX.model_copy(update={"env": (("A", "1"),)}))
