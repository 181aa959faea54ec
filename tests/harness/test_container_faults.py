"""What breaks, breaks one cell, in containers too: the faults of `test_faults_real` and those that only Docker has."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest
from stand_in import TINY
from stub_host import Contained, Stubs, cell, number_of, play
from test_containers import ours
from test_faults_real import FAULTS, a_stranger_on_the_first_port, attempts, host, nothing_held, stubs

from harness import ledger
from harness.server.containers import connect, remove_orphans
from harness.server.process import Limits
from harness.verdict import Verdict

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
LIMITS = Limits(start=120, request=8, stop=1)  # a busy host is slow


@pytest.fixture(autouse=True)
def nothing_left(docker, tmp_path, monkeypatch):
    """Afterwards no container, no guard and no lease is left."""
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    yield
    until = time.monotonic() + 30
    while time.monotonic() < until and (ours(docker.client) or stubs(tmp_path)):
        time.sleep(0.2)
    assert ours(docker.client) == []
    assert stubs(tmp_path) == []
    assert nothing_held()


def run(run_dir: Path, behaviours: dict[int, list[str]], jobs: int = 1, limits: Limits = LIMITS):
    return play(run_dir, behaviours, jobs=jobs, limits=limits, place=Contained(behaviours, image=TINY))


class Watch(threading.Thread):
    """Does `what` as soon as some server of the run in `run_dir` has said `word`; for a minute at most."""

    def __init__(self, run_dir: Path, word: str, what):
        super().__init__(daemon=True)
        self.run_dir, self.word, self.what = run_dir, word, what
        self.start()

    def run(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if any(self.word in log.read_text(errors="replace") for log in self.run_dir.glob("cells/*/server.log")):
                self.what()
                return
            time.sleep(0.05)


def test_every_fault_is_an_error_of_its_cell_alone(tmp_path):
    """All at once, four at a time, between two that are well."""
    numbered = dict(enumerate(FAULTS, 2))
    behaviours = {1: ["well"], **{number: [fault[0]] for number, fault in numbered.items()}, 20: ["well"], 21: ["slow"]}
    found = run(tmp_path / "run", behaviours, jobs=4)
    seen = {
        behaviour: (
            found[number].verdict,
            words in found[number].reason or found[number].reason,
            found[number].attempts,
        )
        for number, (behaviour, words, _) in numbered.items()
    }
    assert seen == {behaviour: (Verdict.ERROR, True, tries) for behaviour, _, tries in FAULTS}
    for number, (_, _, tries) in numbered.items():
        assert len(attempts(tmp_path / "run", number)) == tries
    assert [found[number].verdict for number in (1, 20, 21)] == [Verdict.PASS] * 3


def test_containers_killed_from_outside_are_started_again(docker, tmp_path):
    """One while it starts, one while it answers; beside them, a third is left alone."""
    from docker.errors import APIError

    def kill(behaviour: str) -> None:
        for name in ours(docker.client):
            with contextlib.suppress(APIError):  # others end at this very moment
                made = docker.client.containers.get(name)
                if behaviour in made.attrs["Config"]["Cmd"]:
                    made.kill()

    run_dir = tmp_path / "run"
    watches = [
        Watch(run_dir, "stub starts silent", lambda: kill("silent")),
        Watch(run_dir, "asked", lambda: kill("hangs")),
    ]
    found = run(
        run_dir,
        {1: ["silent", "well"], 2: ["hangs", "well"], 3: ["well"]},
        jobs=3,
        limits=Limits(start=120, request=100, stop=1),
    )
    for watch in watches:
        watch.join()
    assert {number: result.verdict for number, result in found.items()} == dict.fromkeys((1, 2, 3), Verdict.PASS)
    assert [attempts(run_dir, number)[0] for number in (1, 2, 3)] == [("error", "killed")] * 2 + [("pass", None)]
    assert "failed at start: killed" in found[1].reason and "failed while answering: killed" in found[2].reason


def test_a_container_that_never_is_ready_meets_its_deadline_twice(tmp_path):
    found = run(tmp_path / "run", {1: ["silent"]}, limits=Limits(start=3, request=2, stop=0.5))
    assert "at start: deadline passed: not ready after 3 s" in found[1].reason
    assert attempts(tmp_path / "run", 1) == [("error", "deadline passed")] * 2


def test_a_port_that_is_taken_before_docker_publishes_it(tmp_path, monkeypatch):
    with a_stranger_on_the_first_port(Contained, monkeypatch):
        found = run(tmp_path / "run", {1: ["well"]})
    assert (found[1].verdict, found[1].attempts) == (Verdict.PASS, 2)
    assert attempts(tmp_path / "run", 1)[0] == ("error", "port in use")


QUICK = ("start", "ask", "result")
LATER = ("run-start", "cell-start", "lease", "stop", "attempt", "run-end")


@pytest.mark.parametrize("stage", [*QUICK, *(pytest.param(stage, marks=pytest.mark.nightly) for stage in LATER)])
def test_a_killed_harness_is_resumed_where_it_was(tmp_path, stage):
    """Its guards end their containers; the resumed run starts only what has no row."""
    run_dir, two = tmp_path / "run", ("--docker", TINY, "well", "well")
    killed = host(run_dir, *two, "--die-at", stage)
    said = killed.communicate(timeout=100)[0]
    assert killed.returncode == -signal.SIGKILL, said
    events, _ = ledger.read(run_dir / ledger.NAME)
    done = {number_of(result.cell) for result in ledger.results(events)}
    resumed = host(run_dir, *two, "--resume")
    said = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0, said
    started = {line.split()[1] for line in said.splitlines() if line.startswith("start ")}
    assert started == {cell(number).id for number in (1, 2) if number not in done}
    events, warnings = ledger.read(run_dir / ledger.NAME)
    verdicts = {number_of(result.cell): result.verdict for result in ledger.results(events)}
    assert verdicts == dict.fromkeys((1, 2), Verdict.PASS) and warnings == []


def test_ctrl_c_twice_ends_containers_at_once(docker, tmp_path):
    running = host(tmp_path / "run", "--docker", TINY, "hangs")
    assert "start" in running.stdout.readline()
    until = time.monotonic() + 30
    while time.monotonic() < until and not ours(docker.client):
        time.sleep(0.05)
    for _ in range(2):
        running.send_signal(signal.SIGINT)
        time.sleep(0.3)
    running.communicate(timeout=60)
    assert running.returncode == 130
    events, _ = ledger.read(tmp_path / "run" / ledger.NAME)
    assert ledger.results(events) == [] and events[-1]["event"] == "run-end"


class Mixed(Contained):
    """Even cells run as processes, beside the containers of the odd ones."""

    def launch(self, cell, folder, port, gpus):
        place = Contained if number_of(cell) % 2 else Stubs
        return place.launch(self, cell, folder, port, gpus)

    prefix = ()


def test_a_daemon_that_stops_under_a_run_fails_its_cells_and_no_others(docker, tmp_path):
    if docker.process is None:
        pytest.skip("this daemon was there before, and is not stopped")
    behaviours = {1: ["hangs"], 2: ["slow"], 4: ["well"]}
    stopping = Watch(tmp_path / "run", "asked", docker.stop)
    try:
        limits = Limits(start=120, request=60, stop=1)
        found = play(tmp_path / "run", behaviours, jobs=2, limits=limits, place=Mixed(behaviours, image=TINY))
    finally:
        stopping.join()
        docker.start()
        docker.client = connect()
        remove_orphans(docker.client)
    assert [found[number].verdict for number in (1, 2, 4)] == [Verdict.ERROR, Verdict.PASS, Verdict.PASS]
    assert "container daemon: container: the Docker daemon" in found[1].reason, found[1].reason
    assert attempts(tmp_path / "run", 1) == [("error", "container daemon")] * 2


def test_a_missing_image_is_an_error_of_its_cell_alone(tmp_path):
    """A neighbour whose image is there is not touched."""
    behaviours = {1: ["well"], 2: ["well"]}

    class Lacking(Contained):
        def launch(self, cell, folder, port, gpus):
            self.image = TINY if number_of(cell) == 2 else "helix-cpu-of-no-code"
            return super().launch(cell, folder, port, gpus)

    found = play(tmp_path / "run", behaviours, limits=LIMITS, place=Lacking(behaviours, image=TINY))
    assert (found[1].verdict, found[1].attempts, found[2].verdict) == (Verdict.ERROR, 1, Verdict.PASS)
    assert "missing image: container: there is no image helix-cpu-of-no-code; build it: " in found[1].reason


def test_a_disk_that_fills_under_a_live_container_ends_the_run_and_is_resumed(small_disk):
    run_dir = small_disk / "run"
    ended = host(run_dir, "--docker", TINY, "well", "fills", "well", flood=2**21)
    said = ended.communicate(timeout=100)[0]
    assert ended.returncode == 1 and "No space left on device" in said, said
    events, warnings = ledger.read(run_dir / ledger.NAME)
    assert warnings == [] and [number_of(result.cell) for result in ledger.results(events)] == [1]
    for log in run_dir.glob("cells/*/server.log"):
        log.unlink()
    resumed = host(run_dir, "--docker", TINY, "--resume")
    said = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0, said
    assert sum(line.startswith("start ") for line in said.splitlines()) == 2


@pytest.mark.nightly
def test_a_flood_of_a_gigabyte(tmp_path):
    found = run(tmp_path / "run", {1: ["floods"], 2: ["well"]}, jobs=2, limits=Limits(start=250, request=5, stop=1))
    assert [found[number].verdict for number in (1, 2)] == [Verdict.PASS] * 2
    assert found[1].kv_cache_tokens == 21824
    log = max((tmp_path / "run").rglob("server.log"), key=lambda path: path.stat().st_size).stat()
    assert log.st_size > 2**30 * 0.99 and log.st_blocks * 512 < 2**28
