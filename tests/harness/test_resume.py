"""A resumed run keeps what still holds, runs the rest, and no retry hides a comparison."""

import errno
import json
import os

import pytest
from made_band import made_band
from test_runner import BASE, HELIX, OTHER, Table, failed, good, planned, transcript

from harness import runner
from harness.ledger import Ledger, LedgerBusy, clock_jumps, read, results
from harness.oracle.bands import Bands
from harness.passed import computing
from harness.redact import hide_in_file, hide_secrets
from harness.resume import Setting
from harness.runner import folder_name, run
from harness.server.log import Cause
from harness.verdict import Verdict

PLAN = [planned(BASE), planned(HELIX), planned(OTHER)]


class Saving(Table):
    """Leaves its transcript in the folder, as an executor does. A list of answers is given out one an attempt."""

    def attempt(self, cell, folder, follow, ask=True):
        answers = self.answers.get(cell.key)
        if isinstance(answers, list):
            self.ran.append((cell, follow is not None, ask))
            made = answers.pop(0)
        else:
            made = super().attempt(cell, folder, follow, ask)
        folder.mkdir(parents=True)
        if made.transcript:
            made.transcript.save(folder / "transcript.json")
        return made


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """The code's own key, which others may be editing: `code("new")` changes it."""

    def set_to(key: str) -> None:
        monkeypatch.setattr(runner, "code_key", lambda: key)

    set_to("old")
    return set_to


def play(folder, plan=PLAN, resume=False, repeat=1, **answers):
    table = Saving(answers={cell.key: answer for cell, answer in answers.get("answers", {}).items()})
    said: list[str] = []
    found = run(plan, run_dir=folder, executor=table, progress=said.append, resume=resume, repeat=repeat)
    return found, [cell for cell, *_ in table.ran], said


def cut(folder, after: int) -> None:
    """Keep the ledger up to and with its `after`-th result, as a kill at that moment leaves it."""
    path, kept, seen = folder / "ledger.ndjson", [], 0
    for line in path.read_text().splitlines(keepends=True):
        if seen < after:
            kept.append(line)
        seen += '"event": "result"' in line
    path.write_text("".join(kept))


def test_only_what_is_missing_is_run(tmp_path):
    first, ran, _ = play(tmp_path)
    assert ran == [BASE, HELIX, OTHER]
    cut(tmp_path, 2)
    found, ran, _ = play(tmp_path, resume=True)
    assert ran == [OTHER]
    assert [result.cell for result in found] == [BASE, HELIX, OTHER]
    assert [(r.started, r.transcript_digest) for r in found[:2]] == [
        (r.started, r.transcript_digest) for r in first[:2]
    ]
    events, _ = read(tmp_path / "ledger.ndjson")
    starts = [event for event in events if event["event"] == "run-start"]
    assert starts[1]["resumed"] and starts[1]["kept"] == [BASE.id, HELIX.id]
    assert len(results(events)) == 3


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    play(tmp_path)
    found, ran, _ = play(tmp_path, resume=True)
    assert ran == [] and [result.verdict for result in found] == [Verdict.PASS] * 3


def test_other_code_makes_every_result_stale(tmp_path, code):
    play(tmp_path)
    code("new")
    assert play(tmp_path, resume=True)[1] == [BASE, HELIX, OTHER]


def test_what_the_suite_expects_is_part_of_the_key(tmp_path):
    play(tmp_path)
    changed = [planned(BASE), planned(HELIX, Verdict.XFAIL), planned(OTHER)]
    found, ran, _ = play(tmp_path, changed, resume=True)
    assert ran == [HELIX] and found[1].verdict is Verdict.XPASS


@pytest.mark.parametrize("damage", ["gone", "torn", "another"])
def test_a_baseline_without_its_transcript_runs_again_with_all_that_followed_it(tmp_path, damage):
    play(tmp_path)
    path = tmp_path / "cells" / folder_name(BASE) / "transcript.json"
    if damage == "gone":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        transcript(BASE, shift=0.5).save(path)
    assert play(tmp_path, resume=True)[1] == [BASE, HELIX, OTHER]


def test_errors_run_again_and_failures_do_not(tmp_path):
    off = good(HELIX, transcript=transcript(HELIX, shift=0.3))
    lost = failed(OTHER, Cause.OTHER, "boom")
    found, _, _ = play(tmp_path, answers={HELIX: off, OTHER: lost})
    assert [result.verdict for result in found] == [Verdict.PASS, Verdict.FAIL, Verdict.ERROR]
    found, ran, _ = play(tmp_path, resume=True)
    assert ran == [OTHER]
    assert [result.verdict for result in found] == [Verdict.PASS, Verdict.FAIL, Verdict.PASS]


def test_infrastructure_is_tried_again_once_and_recorded(tmp_path):
    lost = failed(HELIX, Cause.PORT_IN_USE, "taken")
    found, ran, said = play(tmp_path, answers={HELIX: [lost, good(HELIX)]})
    assert ran == [BASE, HELIX, HELIX, OTHER]
    assert (found[1].verdict, found[1].attempts) == (Verdict.PASS, 2)
    assert "an attempt before was lost to infrastructure" in found[1].reason and "taken" in found[1].reason
    events, _ = read(tmp_path / "ledger.ndjson")
    told = [(e["number"], e["verdict"], e["cause"]) for e in events if e["event"] == "attempt" and e["id"] == HELIX.id]
    assert told == [(1, "error", "port in use"), (2, "pass", None)]
    assert any(line.startswith("again") for line in said)


@pytest.mark.parametrize(
    ("cause", "started", "starts"),
    [
        (Cause.PORT_IN_USE, False, 2), (Cause.KILLED, True, 2), (Cause.TIMEOUT, False, 2), (Cause.NCCL, False, 2),
        (Cause.OTHER, False, 1), (Cause.OUT_OF_MEMORY, True, 1), (Cause.PORT_IN_USE, True, 2),
        (Cause.MISSING_MODEL, False, 1), (Cause.OUT_OF_MEMORY, False, 1), (Cause.MISSING_IMAGE, False, 1),
    ],
)  # fmt: skip
def test_what_a_host_does_is_an_error_and_tried_again_where_it_may_pass(tmp_path, cause, started, starts):
    lost = failed(HELIX, cause, "why", started)
    found, ran, _ = play(tmp_path, [planned(BASE), planned(HELIX)], answers={HELIX: lost})
    assert ran.count(HELIX) == starts == found[1].attempts
    assert found[1].verdict is Verdict.ERROR


@pytest.mark.parametrize("cause", [Cause.OTHER, Cause.TIMEOUT, Cause.BROKEN_ANSWER, Cause.ILLEGAL_ACCESS, Cause.NCCL])
def test_a_cell_that_dies_twice_while_answering_what_its_baseline_answered_fails(tmp_path, cause):
    died = failed(HELIX, cause, "why", started=True)
    found, ran, _ = play(tmp_path / "twice", [planned(BASE), planned(HELIX)], answers={HELIX: [died, died]})
    assert ran.count(HELIX) == 2 and found[1].verdict is Verdict.FAIL
    assert found[1].reason.endswith("so it did 2 times, where its baseline answered all")
    found, _, _ = play(tmp_path / "once", [planned(BASE), planned(HELIX)], answers={HELIX: [died, good(HELIX)]})
    assert found[1].verdict is Verdict.PASS and "an attempt before was lost" in found[1].reason
    killed = failed(HELIX, Cause.KILLED, "from outside", started=True)
    found, _, _ = play(tmp_path / "host", [planned(BASE), planned(HELIX)], answers={HELIX: [died, killed]})
    assert found[1].verdict is Verdict.ERROR


def test_a_baseline_that_dies_while_answering_is_an_error(tmp_path):
    died = failed(BASE, Cause.OTHER, "why", started=True)
    found, _, _ = play(tmp_path, [planned(BASE), planned(HELIX)], answers={BASE: [died, died]})
    assert [result.verdict for result in found] == [Verdict.ERROR, Verdict.ERROR]


def test_a_comparison_that_failed_is_never_tried_again(tmp_path):
    off = good(HELIX, transcript=transcript(HELIX, shift=0.3))
    found, ran, _ = play(tmp_path, [planned(BASE), planned(HELIX)], answers={HELIX: [off, good(HELIX)]})
    assert ran.count(HELIX) == 1 and found[1].verdict is Verdict.FAIL


def test_two_starts_of_one_cell_are_compared_with_each_other(tmp_path):
    """Each start is within the band of its baseline (4e-4 on either side); from the first to the second it is not."""
    near = [good(HELIX, transcript=transcript(HELIX, shift=shift)) for shift in (-4e-4, 4e-4)]
    answers = {BASE: [good(BASE)] * 2, HELIX: near}

    def seen(folder: str, band):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Bands, "of", lambda self, cell: band)
            return play(tmp_path / folder, [planned(BASE), planned(HELIX)], repeat=2,
                        answers={cell: list(some) for cell, some in answers.items()})[0]  # fmt: skip

    base, apart = seen("apart", made_band(change=5e-4))
    assert apart.verdict is Verdict.FLAKY and "two starts of it differ: prefill: largest logprob" in apart.reason
    assert base.verdict is Verdict.PASS and "another start of it: 2 steps agree" in base.reason
    _, close = seen("close", made_band(change=1e-3))
    values = {item.name: item.value for item in close.statistics}
    assert close.verdict is Verdict.PASS
    assert values["between two starts, decode: largest logprob change"] == pytest.approx(8e-4)
    assert values["decode: largest logprob change"] == pytest.approx(4e-4)
    assert "a run of 3 cells" in close.band  # two comparisons with the baseline, one between the starts


def test_a_baseline_started_twice_is_a_source_of_the_null(tmp_path):
    plan = [planned(BASE)]
    bands: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bands, "add", lambda self, cell, kind, first, second: bands.append(kind))
        play(tmp_path, plan, repeat=3, answers={BASE: [good(BASE)] * 3})
    assert bands == ["again", "again"]


def test_repeated_attempts_that_disagree_are_flaky_and_a_failure(tmp_path):
    off = good(HELIX, transcript=transcript(HELIX, shift=0.3))
    plan = [planned(BASE), planned(HELIX)]
    answers = [good(HELIX), off, good(HELIX)]
    found, ran, _ = play(tmp_path, plan, repeat=3, answers={BASE: [good(BASE)] * 3, HELIX: answers})
    assert ran == [BASE] * 3 + [HELIX] * 3
    assert (found[0].verdict, found[1].verdict, found[1].effect) == (Verdict.PASS, Verdict.FLAKY, "differs")
    assert "2 x pass and 1 x fail" in found[1].reason and "largest logprob change is 0.3" in found[1].reason


def test_a_failure_judged_before_the_kill_is_not_forgotten(tmp_path):
    """The attempt is in the ledger, its row is not: passing now does not make it a pass."""
    off = good(HELIX, transcript=transcript(HELIX, shift=0.3))
    play(tmp_path, [planned(BASE), planned(HELIX)], answers={HELIX: off})
    cut(tmp_path, 1)
    path = tmp_path / "ledger.ndjson"
    assert [e["verdict"] for e in read(path)[0] if e["event"] == "attempt"] == ["pass"]
    play_again = tmp_path / "again"
    play(play_again, [planned(BASE), planned(HELIX)], answers={HELIX: off})
    lines = (play_again / "ledger.ndjson").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not ('"event": "result"' in line and HELIX.mode in line and '"kvp": 2' in line)]
    (play_again / "ledger.ndjson").write_text("".join(kept[:-1]))
    found, ran, _ = play(play_again, [planned(BASE), planned(HELIX)], resume=True)
    assert ran == [HELIX] and found[1].verdict is Verdict.FLAKY


def test_a_torn_ledger_is_resumed_and_said(tmp_path):
    play(tmp_path)
    cut(tmp_path, 1)
    with (tmp_path / "ledger.ndjson").open("a") as file:
        file.write('{"event": "result", "resu')
    found, ran, said = play(tmp_path, resume=True)
    assert ran == [HELIX, OTHER] and [result.verdict for result in found] == [Verdict.PASS] * 3
    assert any(line.startswith("ledger: ledger.ndjson:") and "torn last line" in line for line in said)


def test_old_proofs_are_moved_out_of_the_way(tmp_path):
    play(tmp_path, [planned(BASE)])
    folder = tmp_path / "cells" / folder_name(BASE)
    (folder / "proof").mkdir()
    (folder / "transcript.json").unlink()
    play(tmp_path, [planned(BASE)], resume=True)
    assert not (folder / "proof").exists() and (folder.with_name(f"{folder.name}.1") / "proof").exists()


def test_two_writers_of_one_run_are_kept_apart(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.alone(), pytest.raises(LedgerBusy, match="another harness is writing"), Ledger(tmp_path).alone():
        pass
    with Ledger(tmp_path).alone():
        pass


def test_a_full_disk_ends_the_run_and_keeps_whole_lines(tmp_path, monkeypatch):
    """The disk takes half of a line: it is taken back, and the ledger stays readable."""
    ledger = Ledger(tmp_path)
    ledger.cell_start("a")
    real, calls = os.write, []

    def full(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        ledger.cell_start("b")
    monkeypatch.undo()
    assert raised.value.filename == str(ledger.path)
    events, warnings = read(ledger.path)
    assert [event["id"] for event in events] == ["a"] and warnings == []


def test_a_jumping_clock_is_said_and_nothing_else(tmp_path):
    def event(kind: str, seconds: int, clock: float) -> dict:
        return {"event": kind, "time": f"2026-11-24T00:{seconds // 60:02}:{seconds % 60:02}+00:00", "clock": clock}

    steady = [event("run-start", 0, 100.0), event("cell-start", 30, 130.0), event("result", 61, 160.5)]
    assert clock_jumps(steady) == []
    assert clock_jumps([*steady, event("result", 10, 170.5)]) == [
        "the host's clock jumped back by 61 s before 2026-11-24T00:00:10+00:00"
    ]
    assert clock_jumps([*steady, event("run-start", 2000, 1.0)]) == []  # another session, another boot


def test_secrets_reach_no_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value-of-mine")
    ledger = Ledger(tmp_path)
    ledger.run_start("r", [], [], ["x", "--hf-token=abcdefgh", "s3cr3t-value-of-mine"])
    ledger.attempt("a", "k", 1, "error", 'said "s3cr3t-value-of-mine" and hf_abcdefghijklmnopqrstuvwx', None)
    text = ledger.path.read_text()
    for secret in ("s3cr3t-value-of-mine", "hf_abcdefghij", "abcdefgh"):
        assert secret not in text
    assert json.loads(text.splitlines()[1])["reason"] == 'said "***" and ***'
    assert hide_secrets("--max-num-batched-tokens=64 key=5 Bearer abcdefghijkl") == (
        "--max-num-batched-tokens=64 key=5 Bearer ***"
    )


def test_passwords_in_urls_and_tokens_of_forges_are_hidden(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://me:pw-of-database@db/x")
    told = hide_secrets("at postgres://you:else@h/y, pw-of-database, github_pat_0123456789abcdefghijAB GH_PAT=abc12345")
    assert told == "at postgres://you:***@h/y, ***, *** GH_PAT=***"
    assert hide_secrets("http://127.0.0.1:8000/v1 a@b.c") == "http://127.0.0.1:8000/v1 a@b.c"


def test_secrets_are_blotted_out_of_a_file_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value-of-mine")
    path = tmp_path / "server.log"
    with path.open("wb") as file:
        file.write("ö s3cr3t-value-of-mine, key-of-run\n".encode())
        file.seek(2**24)  # a hole, as a shortened log has
        file.write(b"Bearer abcdefghijkl\n")
    blocks = path.stat().st_blocks
    hide_in_file(path, ("key-of-run",))
    data = path.read_bytes()
    assert data.startswith("ö ********************, **********\n".encode())
    assert data.endswith(b"Bearer ************\n") and len(data) == 2**24 + 20
    assert path.stat().st_blocks <= blocks + 8
    hide_in_file(tmp_path / "none")  # nothing to do


def test_hostile_text_is_searched_in_bounded_time(tmp_path):
    """Each of these took time by the square of its length where a pattern had no bound; a secret on a seam is found."""
    path = tmp_path / "server.log"
    seam = b"x" * (2**20 - 10) + b" Bearer abcdefghijkl "
    path.write_bytes(seam + b"-" * 2**21 + b"a." * 2**20 + b"_" * 2**20)
    hide_in_file(path)
    assert b"abcdefgh" not in path.read_bytes() and path.stat().st_size == len(seam) + 2**22 + 2**20


def test_the_environment_that_servers_compute_by_is_part_of_the_key():
    environment = {
        "VLLM_USE_V2_MODEL_RUNNER": "0", "NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HOME": "/root",
        "HELIX_CACHE": "/c", "HELIX_LEASES": "/l", "VLLM_API_KEY": "k", "FLASHINFER_X": "1", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    found = computing(environment)
    assert [name for name, _ in found] == [
        "CUBLAS_WORKSPACE_CONFIG", "FLASHINFER_X", "NCCL_ALGO", "TORCHDYNAMO_DISABLE", "VLLM_USE_V2_MODEL_RUNNER",
    ]  # fmt: skip
    assert Setting(versions=(), hardware=()).key != Setting(versions=(), hardware=(), environment=found).key
