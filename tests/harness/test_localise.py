"""A failed cell runs once more with capture on; what its workers wrote is told in a sentence, whatever happens."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from test_runner import BASE, HELIX, Table, failed, good, planned, proofs, transcript

from harness.cell import Cell, Mode
from harness.executors.local import Attempt
from harness.ledger import read, results
from harness.localise import can_localise, describe, read_captures, with_capture
from harness.runner import folder_name, run
from harness.server.launch import make_launch
from harness.server.log import Cause
from harness.verdict import Verdict

OFF = good(HELIX, transcript=transcript(HELIX, shift=0.3))
NOTHING = "localisation: the run with capture checked nothing"


def captured(folder: Path, rank: int, calls: int, **first) -> None:
    """Write what the worker of `rank` writes; `first` are fields of its first deviation."""
    found = None
    if first:
        found = {
            "call": 0, "layer": 0, "head": 0, "rank": rank, "kvp_rank": rank % 2, "request": 0, "position": 0,
            "requests": 1, "decode": True, "error": 0.5, **first,
        }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    record = {"rank": rank, "calls": calls, "tolerance": 1e-4, "first": found}
    (folder / f"capture.rank{rank}.json").write_text(json.dumps(record))


def test_the_earliest_call_wins_over_larger_errors(tmp_path):
    captured(tmp_path, 0, 40)
    captured(tmp_path, 1, 40, call=7, layer=3, head=2, error=9.0)
    captured(
        tmp_path, 2, 38, call=5, layer=1, head=6, request=2, position=130, requests=12, decode=False, error=0.03125
    )
    captured(tmp_path, 3, 40, call=6, layer=2, head=7, error=1.0)
    calls, found = read_captures(tmp_path)
    assert calls == 40 and [one.rank for one in found] == [1, 2, 3]
    assert describe(tmp_path) == (
        "localisation: the first wrong merge is in layer 1, query head 6, on rank 2 (KVP rank 0), at position 130 of "
        "row 2 in a prefill batch of 12: relative error 0.031 against fp64 from the shards; ranks that differ there: 2"
    )


def test_of_one_call_the_largest_error_is_told_and_all_ranks_are_named(tmp_path):
    captured(tmp_path, 0, 9, call=4, layer=1, head=0, error=0.25)
    captured(tmp_path, 1, 9, call=4, layer=1, head=3, position=33, error=0.75)
    captured(tmp_path, 2, 9, call=8, layer=2, head=5, error=4.0)
    captured(tmp_path, 3, 9, call=4, layer=1, head=7, error=0.5)
    assert describe(tmp_path) == (
        "localisation: the first wrong merge is in layer 1, query head 3, on rank 1 (KVP rank 1), at position 33 of "
        "row 0 in a decode batch of 1: relative error 0.75 against fp64 from the shards; ranks that differ there: "
        "0, 1, 3"
    )


def test_an_infinite_error_is_the_largest(tmp_path):
    captured(tmp_path, 0, 1, head=1, error=1e9)
    captured(tmp_path, 1, 1, head=2, error=math.inf)
    assert "query head 2, on rank 1" in describe(tmp_path) and "relative error inf" in describe(tmp_path)


def test_no_deviation_points_outside_the_merge(tmp_path):
    captured(tmp_path, 0, 64)
    captured(tmp_path, 1, 66)
    assert read_captures(tmp_path) == (66, [])
    assert describe(tmp_path) == (
        "localisation: all of 66 merged attentions a rank equal fp64 computed from the shards; the error is outside "
        "the merge (what was written to the cache, weights, or after attention)"
    )


def test_nothing_checked_is_said(tmp_path):
    assert read_captures(tmp_path / "absent") == (0, [])
    assert describe(tmp_path / "absent") == NOTHING
    captured(tmp_path, 0, 0)
    (tmp_path / "rank0.json").write_text("not a capture")
    assert describe(tmp_path) == NOTHING


@pytest.mark.parametrize(
    ("fields", "can"),
    [
        ({}, True),
        ({"mode": Mode.STANDARD_DCP}, True),
        ({"mode": Mode.HELIX_MLA, "backend": "HELIX_CPU_MLA"}, True),
        ({"hardware": "hopper", "backend": "FLASH_ATTN"}, False),
        ({"mode": Mode.STANDARD_TP, "backend": "CPU_ATTN", "kvp": 1}, False),
    ],
)
def test_capture_is_for_context_parallel_cells_on_cpu(fields, can):
    assert can_localise(HELIX.model_copy(update=fields)) is can


def test_capture_reaches_the_worker_beside_the_cell_s_own_options(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_CACHE", str(tmp_path / "cache"))
    cell = HELIX.model_copy(update={"helix": (("allow_gqa_tpa1", True),), "fault": "swap-chunks"})
    argv = make_launch(with_capture(cell), tmp_path, 21000).argv
    assert json.loads(argv[argv.index("--additional-config") + 1])["helix"] == {
        "allow_gqa_tpa1": True,
        "capture": True,
        "proof_dir": str(tmp_path / "proof"),
        "fault": "swap-chunks",
    }


class Capturing(Table):
    """Answers the cells as `Table` does; the capture attempt writes files, raises or fails as told."""

    def __init__(self, off: Attempt, capture: Attempt | BaseException | None = None, wrong: bool = True):
        super().__init__(answers={HELIX.key: off})
        self.capture, self.wrong = capture, wrong
        self.captures: list[tuple[Cell, Path, str | None]] = []

    def attempt(self, cell, folder, follow, ask=True):
        if ("capture", True) not in cell.helix:
            return super().attempt(cell, folder, follow, ask)
        assert ask
        self.captures.append((cell, folder, follow and follow.cell_id))
        if isinstance(self.capture, BaseException):
            raise self.capture
        if self.wrong:
            captured(folder / "proof", 0, 12)
            captured(folder / "proof", 1, 12, call=3, layer=1, head=5, position=17)
        return self.capture or good(HELIX)  # it may even agree: the verdict is made already


def play(run_dir: Path, executor: Table, declared: Verdict = Verdict.PASS, cell: Cell = HELIX):
    plan = [planned(BASE), planned(cell, declared)]
    found = run(plan, run_dir=run_dir, progress=lambda line: None, executor=executor)
    events, _ = read(run_dir / "ledger.ndjson")
    rows = {row.cell.key: (row.verdict, row.localisation) for row in results(events)}
    assert rows == {row.cell.key: (row.verdict, row.localisation) for row in found}  # told in the ledger too
    return found[1]


def test_a_failed_cell_is_run_once_more_and_the_sentence_is_in_its_row(tmp_path):
    executor = Capturing(OFF)
    result = play(tmp_path, executor)
    wanted = HELIX.model_copy(update={"helix": (("capture", True),)})
    assert executor.captures == [(wanted, tmp_path / "cells" / folder_name(HELIX) / "capture", BASE.id)]
    assert executor.ran == [(BASE, False, True), (HELIX, True, True)]
    assert result.verdict is Verdict.FAIL and "largest logprob change is 0.3" in result.reason
    assert result.localisation == (
        "localisation: the first wrong merge is in layer 1, query head 5, on rank 1 (KVP rank 1), at position 17 of "
        "row 0 in a decode batch of 1: relative error 0.5 against fp64 from the shards; ranks that differ there: 1"
    )
    assert (result.cell, result.attempts) == (HELIX, 1)
    assert result.transcript_digest == OFF.transcript.digest()


@pytest.mark.parametrize(
    ("capture", "wrong", "told"),
    [
        (OSError("no space"), False, "localisation failed: OSError: no space"),
        (failed(HELIX, Cause.OUT_OF_MEMORY, "no memory"), False, f"{NOTHING}; that run failed: no memory"),
        (good(HELIX), False, NOTHING),
    ],
)
def test_a_capture_that_fails_is_told_and_changes_no_verdict(tmp_path, capture, wrong, told):
    executor = Capturing(OFF, capture, wrong)
    result = play(tmp_path, executor)
    assert len(executor.captures) == 1
    assert (result.verdict, result.localisation) == (Verdict.FAIL, told)
    assert "largest logprob change is 0.3" in result.reason


def test_what_was_captured_before_a_death_is_told_with_it(tmp_path):
    result = play(tmp_path, Capturing(OFF, failed(HELIX, Cause.OTHER, "boom", started=True)))
    assert "first wrong merge is in layer 1, query head 5" in result.localisation
    assert result.localisation.endswith("ranks that differ there: 1; that run failed: boom")


def test_torn_captures_are_told(tmp_path):
    class Torn(Capturing):
        def attempt(self, cell, folder, follow, ask=True):
            made = super().attempt(cell, folder, follow, ask)
            if self.captures:
                (folder / "proof" / "capture.rank1.json").write_text('{"rank": 1, "ca')
            return made

    result = play(tmp_path, Torn(OFF))
    assert result.verdict is Verdict.FAIL
    assert result.localisation.startswith("localisation failed: JSONDecodeError: ")


@pytest.mark.parametrize(
    ("attempt", "declared", "verdict"),
    [
        (good(HELIX), Verdict.PASS, Verdict.PASS),
        (good(HELIX, proofs=()), Verdict.PASS, Verdict.UNPROVEN),
        (OFF, Verdict.XFAIL, Verdict.XFAIL),
        (good(HELIX), Verdict.REJECTED, Verdict.FAIL),  # it started: there are no answers to trace
        (failed(HELIX, Cause.OTHER, "boom"), Verdict.PASS, Verdict.ERROR),
        (failed(HELIX, Cause.REFUSED, "the rule"), Verdict.PASS, Verdict.REJECTED),
    ],
)
def test_nothing_else_is_run_again(tmp_path, attempt, declared, verdict):
    executor = Capturing(attempt)
    result = play(tmp_path, executor, declared)
    assert (result.verdict, result.localisation) == (verdict, "")
    assert executor.captures == []


def test_a_broken_promise_of_capacity_is_not_traced(tmp_path):
    """The answers agree: there is no wrong merge to look for."""
    dcp = {"mode": Mode.STANDARD_DCP, "model": "recipe:llama-k2", "tp": 4, "kvp": 2, "comm": "a2a"}
    cell = HELIX.model_copy(update=dcp)
    executor = Capturing(OFF)
    made = tuple(
        dataclasses.replace(proofs(cell)[rank % 2], rank=rank, tp=4, tpa_rank=rank // 2, group_ranks=ranks, helix=False)
        for rank, ranks in enumerate([(0, 1), (0, 1), (2, 3), (2, 3)])
    )
    executor.answers[cell.key] = good(cell, proofs=made)
    result = play(tmp_path, executor, cell=cell)  # TP/K = 2 is promised, and 4,096 tokens are measured for both
    assert result.verdict is Verdict.FAIL and result.reason.startswith("answers agree, but the KV cache holds 4096")
    assert (result.localisation, executor.captures) == ("", [])


def test_a_failed_gpu_cell_is_not_run_again(tmp_path):
    gpu = HELIX.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    executor = Capturing(OFF)
    executor.answers[gpu.key] = OFF
    result = play(tmp_path, executor, cell=gpu)
    assert (result.verdict, result.localisation, executor.captures) == (Verdict.FAIL, "", [])


def test_ctrl_c_during_the_capture_keeps_the_row_of_the_cell(tmp_path):
    class Interrupting(Capturing):
        def attempt(self, cell, folder, follow, ask=True):
            if ("capture", True) in cell.helix:
                import _thread

                _thread.interrupt_main()
                assert self.cancel.wait(20)
                return failed(cell, Cause.INTERRUPTED, "the run was interrupted")
            return super().attempt(cell, folder, follow, ask)

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, Interrupting(OFF))
    events, _ = read(tmp_path / "ledger.ndjson")
    assert [(row.cell, row.verdict) for row in results(events)] == [(BASE, Verdict.PASS), (HELIX, Verdict.FAIL)]
    assert results(events)[1].localisation == f"{NOTHING}; that run failed: the run was interrupted"


def test_localising_can_be_left_out(tmp_path):
    executor = Capturing(OFF)
    plan = [planned(BASE), planned(HELIX)]
    _, result = run(plan, run_dir=tmp_path, progress=lambda line: None, executor=executor, localise=False)
    assert (result.verdict, result.localisation, executor.captures) == (Verdict.FAIL, "", [])
