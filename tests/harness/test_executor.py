"""One cell from start to stop on the stub server: what the executor hands back, and what it leaves on disk."""

import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from test_server import gone, launch, logged

from harness.cell import Cell, Mode
from harness.executors.local import SMALL_BATCH, LocalExecutor, dtype_of, in_other_batches
from harness.lease import Host
from harness.need import Need, Room
from harness.server.log import Cause
from harness.server.place import Processes
from harness.server.process import Limits
from harness.transcript import Transcript
from harness.workload import make_workload
from helix_runtime.proof import ProofWriter

CELL = Cell(
    mode=Mode.HELIX_GQA, backend="HELIX_CPU", hardware="cpu", model="recipe:llama-k4", tp=2, kvp=2, workload="smoke"
)


@pytest.fixture
def executor():
    """`executor(behaviour)` runs the stub in that behaviour instead of a cell's server."""

    def made(behaviour: str) -> LocalExecutor:
        class Stubs(Processes):
            def launch(self, cell, folder, port, gpus):
                return launch(behaviour, port).model_copy(update={"proof_dir": folder / "proof"})

        return LocalExecutor(Limits(start=20, stop=0.3), Stubs(), Host(Room(cores=8, memory_bytes=2**40)))

    return made


def test_a_whole_attempt(executor, tmp_path):
    ProofWriter(tmp_path / "proof", 0)  # a counter file alone is no proof
    attempt = executor("well").attempt(CELL, tmp_path, None)
    assert attempt.started and attempt.failure is None and attempt.proofs == ()
    assert attempt.kv_cache_tokens == 21824 and "stub" in attempt.log_tail
    assert [phase.name for phase in attempt.phases] == [
        "lease",
        "model",
        "imports",
        "start",
        "workload",
        "stop",
        "release",
    ]
    assert Transcript.load(tmp_path / "transcript.json") == attempt.transcript
    assert all(len(answer.steps) > 0 for answer in attempt.transcript.answers)
    assert gone(int(logged(tmp_path, r"stub (\d+)")))


def test_without_asking_it_is_only_started(executor, tmp_path):
    attempt = executor("well").attempt(CELL, tmp_path, None, ask=False)
    assert attempt.started and attempt.failure is None and attempt.transcript is None


def test_a_refusal_is_a_failure_before_the_start(executor, tmp_path):
    attempt = executor("refused").attempt(CELL, tmp_path, None)
    assert not attempt.started and attempt.failure.cause is Cause.REFUSED


def test_a_death_while_answering_keeps_its_cause(executor, tmp_path):
    attempt = executor("dies-answering").attempt(CELL, tmp_path, None)
    assert attempt.started and "the engine fell over" in attempt.failure.reason and attempt.transcript is None


def test_end_all_kills_what_runs(executor, tmp_path):
    made, found = executor("silent"), []
    thread = threading.Thread(target=lambda: found.append(made.attempt(CELL, tmp_path, None)))
    thread.start()
    pid = int(logged(tmp_path, r"stub (\d+)"))
    made.end_all()
    thread.join(20)
    assert found[0].failure.cause is Cause.INTERRUPTED and gone(pid)


@pytest.mark.parametrize(
    ("model", "serve", "dtype"),
    [
        ("recipe:llama-k4", (), "float32"),
        ("recipe:llama-k4", (("dtype", "bfloat16"),), "bfloat16"),
        ("org/model", (("dtype", "half"),), "float16"),
        ("org/model", (), "bfloat16"),
    ],
)
def test_dtypes(model, serve, dtype):
    assert dtype_of(CELL.model_copy(update={"model": model, "serve": serve})) == dtype


def test_a_server_that_is_to_be_refused_takes_one_core_however_many_ranks_it_names():
    many = CELL.model_copy(update={"tp": 16, "kvp": 4})
    host = LocalExecutor(host=Host(Room(cores=8, memory_bytes=2**40)))
    assert host._need(many, ask=True).cores == 8 and host._need(many, ask=False).cores == 1
    on_gpus = many.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    assert host._need(on_gpus, ask=False) == host._need(on_gpus, ask=True)


def test_on_ray_few_are_asked_for_at_a_time_and_what_is_granted_meanwhile_is_found():
    """A pending group is no miss: one that was granted, and holds GPUs, may stand behind any number that are not."""
    pytest.importorskip("ray")
    from harness.executors.ray import _ASKED, RayExecutor

    granted: set[str] = set()

    class Groups(RayExecutor):
        def __init__(self):
            self._lock, self._leases = threading.Lock(), {}

        def _place(self, cell):
            return cell.key

        def _current(self, held, placed):
            return held or SimpleNamespace(group=SimpleNamespace(wait=lambda timeout_seconds: placed in granted))

    executor, cells = Groups(), [CELL.model_copy(update={"interleave": 2**step}) for step in range(12)]
    assert [executor.reserve(cell) for cell in cells] == [None] * 12
    assert list(executor._leases) == [cell.key for cell in cells[: _ASKED + 1]]
    granted.add(cells[3].key)
    assert executor.reserve(cells[3]) is True and executor.reserve(cells[11]) is None
    executor._leases.pop(cells[3].key)  # as its attempt does
    assert executor.reserve(cells[11]) is None and cells[11].key in executor._leases


def test_the_second_answer_is_asked_in_other_batches():
    """What a prompt shares a batch with changes, nothing else; few go one after the other."""
    workload = make_workload(tp=4, block=16, vocab=512, max_model_len=4096, seats=16)
    other = in_other_batches(workload)
    assert [p.model_copy(update={"batch": 0}) for p in other.prompts] == [
        p.model_copy(update={"batch": 0}) for p in workload.prompts
    ]

    def companions(asked):
        return {p.name: {q.name for q in asked.prompts if p.batch and q.batch == p.batch} for p in asked.prompts}

    before, after = companions(workload), companions(other)
    assert all(before[name] != after[name] for name in before)
    together = [p.name for p in workload.prompts if p.batch]
    assert {len(after[name]) for name in together[:-SMALL_BATCH]} == {SMALL_BATCH}
    assert after["00-boundary-1"] == {p.name for p in workload.prompts if not p.batch}


@pytest.fixture(scope="module")
def to_the_end():
    with ExitStack() as held:
        yield held


@pytest.mark.parametrize("turn", range(2))
def test_what_one_test_holds_another_does_not_miss(turn, to_the_end):
    """Each takes the whole host, and none gives it back before both have ended."""
    lease = Host(Room(cores=8)).take(Need(cores=8))
    to_the_end.callback(lease.release)
