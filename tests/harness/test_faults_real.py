"""What breaks, breaks one cell: real processes, each fault with its verdict, its words, and nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from stub_host import ROOM, STAGES, Stubs, cell, play

from harness import ledger
from harness.lease import Host, lease_folder, lease_port
from harness.need import Need, Room
from harness.server.log import Cause
from harness.server.memory_kills import MemoryKills
from harness.server.process import Limits, Server
from harness.verdict import Verdict

HOST = Path(__file__).with_name("stub_host.py")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Every test's leases are its own; afterwards none is held and no stub runs."""
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    yield
    until = time.monotonic() + 20
    while time.monotonic() < until and stubs(tmp_path):
        time.sleep(0.1)
    assert stubs(tmp_path) == []
    assert nothing_held()


def stubs(folder: Path) -> list[psutil.Process]:
    """Living stub servers and guards whose leases are in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("HELIX_LEASES") == str(folder / "leases") and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def a_stranger_on_the_first_port(place: type[Stubs], monkeypatch) -> Iterator[None]:
    """Somebody else takes the first port that is leased for a server of `place`, before the server binds it."""
    launch = place.launch
    with ExitStack() as strangers:

        def robbed(self, cell, folder, port, gpus):
            strangers.enter_context(socket.create_server(("127.0.0.1", port)))
            monkeypatch.setattr(place, "launch", launch)
            return launch(self, cell, folder, port, gpus)

        monkeypatch.setattr(place, "launch", robbed)
        yield


def nothing_held() -> bool:
    """Whether a lease of everything is there for the taking; what the dead held is taken back then."""
    lease = Host(ROOM).take(Need(cores=ROOM.cores, memory_bytes=ROOM.memory_bytes))
    if lease is None:
        return False
    lease.release()
    return not list(lease_folder().glob("lease-*"))


def attempts(run_dir: Path, tp: int) -> list[tuple[str, str | None]]:
    """(verdict, cause) of each attempt at a cell, as the ledger has them."""
    events, _ = ledger.read(run_dir / ledger.NAME)
    wanted = cell(tp).id
    return [
        (event["verdict"], event["cause"]) for event in events if event["event"] == "attempt" and event["id"] == wanted
    ]


FAULTS = [
    # behaviour, words in the reason, attempts
    ("out-of-memory", "at start: out of memory: RuntimeError", 1),
    ("port-taken", "at start: port in use: OSError: [Errno 98]", 2),
    ("killed", "at start: killed: SIGKILL (137) from outside", 2),
    ("killed-answering", "while answering: killed: SIGKILL (137) from outside", 2),
    ("dies-answering", "while answering: other: exit status 3: ValueError: the engine fell over", 1),
    ("hangs", "while answering: deadline passed: no answer to prompt", 1),
    ("loses-worker", "while answering: deadline passed: no answer to prompt", 1),
    ("truncates", "while answering: broken answer: the answer to prompt", 1),
    ("lies", "at start: other: no first token: HTTP 503", 1),
    ("wrong-model", "at start: port in use: another server answers on port", 2),
    ("http-500", "no answer to", 1),
    ("nan", "hold no number (NaN or infinity)", 1),
    ("leaks-and-dies", "at start: other: exit status 5", 1),
]


@pytest.mark.parametrize(("behaviour", "words", "number"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_an_error_of_its_cell_alone(tmp_path, behaviour, words, number):
    limits = Limits(start=20, request=2, stop=0.5)
    found = play(tmp_path / "run", {1: ["well"], 2: [behaviour], 3: ["well"]}, jobs=3, limits=limits)
    assert {tp: result.verdict for tp, result in found.items()} == {
        1: Verdict.PASS, 2: Verdict.ERROR, 3: Verdict.PASS,
    }  # fmt: skip
    assert words in found[2].reason
    assert found[2].attempts == number == len(attempts(tmp_path / "run", 2))


def test_a_server_that_never_is_ready_meets_its_deadline_twice(tmp_path):
    found = play(tmp_path / "run", {1: ["silent"]}, limits=Limits(start=1, request=2, stop=0.5))
    assert "at start: deadline passed: not ready after 1 s" in found[1].reason
    assert attempts(tmp_path / "run", 1) == [("error", "deadline passed")] * 2


def test_a_slow_server_passes(tmp_path):
    assert play(tmp_path / "run", {1: ["slow"]})[1].verdict is Verdict.PASS


def test_a_retry_after_infrastructure_is_recorded_and_said(tmp_path):
    found = play(tmp_path / "run", {1: ["killed", "well"]})
    assert (found[1].verdict, found[1].attempts) == (Verdict.PASS, 2)
    assert "an attempt before was lost to infrastructure: the server failed at start: killed" in found[1].reason
    assert attempts(tmp_path / "run", 1) == [("error", "killed"), ("pass", None)]
    folders = sorted(path.name for path in (tmp_path / "run" / "cells").iterdir())
    assert len(folders) == 2 and folders[1] == f"{folders[0]}.1"  # the lost attempt's log is kept


def test_a_port_that_is_taken_between_check_and_bind(tmp_path, monkeypatch):
    """The first start is lost, the second has another port."""
    with a_stranger_on_the_first_port(Stubs, monkeypatch):
        found = play(tmp_path / "run", {1: ["well"]}, limits=Limits(start=20, request=3, stop=0.5))
    assert (found[1].verdict, found[1].attempts) == (Verdict.PASS, 2)
    assert attempts(tmp_path / "run", 1)[0] == ("error", "port in use")


def test_a_flood_of_the_log_fills_no_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FLOOD", str(2**28))
    found = play(tmp_path / "run", {1: ["floods"]}, limits=Limits(start=60, request=5, stop=1))
    assert found[1].verdict is Verdict.PASS and found[1].kv_cache_tokens == 21824
    log = next((tmp_path / "run").rglob("server.log")).stat()
    assert log.st_size > 2**27 and log.st_blocks * 512 < 2**27
    assert len(found[1].log_tail) < 10**5


@pytest.mark.nightly
def test_a_flood_of_a_gigabyte(tmp_path):
    found = play(tmp_path / "run", {1: ["floods"]}, limits=Limits(start=200, request=5, stop=1))
    assert found[1].verdict is Verdict.PASS
    assert next((tmp_path / "run").rglob("server.log")).stat().st_blocks * 512 < 2**28


def test_packing_never_lends_more_than_there_is(tmp_path):
    """Three cells that take 1, 2 and 3 of three cores: never more than three at the same time, and all of them run."""
    found = play(tmp_path / "run", {tp: ["well"] for tp in (1, 2, 3)}, jobs=3, room=Room(cores=3, memory_bytes=2**50))
    assert all(result.verdict is Verdict.PASS for result in found.values())
    events, _ = ledger.read(tmp_path / "run" / ledger.NAME)
    held, most = 0, 0
    for event in events:
        tp = next((tp for tp in found if cell(tp).id == (event.get("id") or "")), 0)
        held += tp * {"cell-start": 1, "attempt": -1}.get(event["event"], 0)
        most = max(most, held)
    assert most == 3


def test_a_cell_beyond_the_host_is_an_error_with_the_arithmetic_where_nobody_skipped_it(tmp_path):
    found = play(tmp_path / "run", {1: ["well"]}, room=Room(cores=2, memory_bytes=2**20))
    assert found[1].verdict is Verdict.ERROR and "this host has 0.0 GiB" in found[1].reason


def host(run_dir: Path, *arguments: str, flood: int = 2**20) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{HOST.parent}:{HOST.parents[2]}", "STUB_FLOOD": str(flood)}
    command = [sys.executable, str(HOST), str(run_dir), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


QUICK = ("start", "ask", "result")


@pytest.mark.parametrize(
    "stage", [stage if stage in QUICK else pytest.param(stage, marks=pytest.mark.nightly) for stage in STAGES]
)
def test_a_killed_harness_is_resumed_where_it_was(tmp_path, stage):
    """Killed by -9 in its second cell (or at the run's ends); the resumed run starts only what has no row."""
    run_dir = tmp_path / "run"
    killed = host(run_dir, "--die-at", stage)
    said = killed.communicate(timeout=100)[0]
    assert killed.returncode == -signal.SIGKILL, said
    events, _ = ledger.read(run_dir / ledger.NAME)
    done = {result.cell.tp for result in ledger.results(events)}
    resumed = host(run_dir, "--resume")
    said = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0, said
    started = {line.split()[1] for line in said.splitlines() if line.startswith("start ")}
    assert started == {cell(tp).id for tp in (1, 2, 3) if tp not in done}
    events, warnings = ledger.read(run_dir / ledger.NAME)
    assert {result.cell.tp: result.verdict for result in ledger.results(events)} == dict.fromkeys(
        (1, 2, 3), Verdict.PASS
    )
    assert events[-1]["event"] == "run-end"
    assert warnings == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_and_twice_at_once(tmp_path, times):
    running = host(tmp_path / "run", "hangs")
    assert "start" in running.stdout.readline()
    until = time.monotonic() + 20
    while time.monotonic() < until and not any("stub_server.py" in " ".join(p.cmdline()) for p in stubs(tmp_path)):
        time.sleep(0.05)
    for _ in range(times):
        running.send_signal(signal.SIGINT)
        time.sleep(0.3)
    running.communicate(timeout=60)
    assert running.returncode == 130
    events, _ = ledger.read(tmp_path / "run" / ledger.NAME)
    assert ledger.results(events) == [] and events[-1]["event"] == "run-end"


def test_two_harnesses_share_a_host(tmp_path):
    """Both finish, each alone in its folder, with ports of their own."""
    runs = [host(tmp_path / name, "--jobs", "2", "well", "slow") for name in ("a", "b")]
    for run in runs:
        assert run.wait(timeout=100) == 0, run.communicate()[0]
        run.stdout.close()


def test_a_second_harness_is_kept_out_of_a_run(tmp_path):
    first = host(tmp_path / "run", "silent")  # for forty seconds
    assert "start" in first.stdout.readline()
    second = host(tmp_path / "run", "--resume")
    second.communicate(timeout=60)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert second.returncode == 1


def smoke(run_dir: Path, *more: str) -> subprocess.CompletedProcess:
    """The real command line, on cells that are all refused at once or skipped: no server is waited for."""
    command = [sys.executable, "-m", "harness", *more, "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=HOST.parents[2])


def test_a_disk_that_fills_under_a_live_server_ends_the_run_and_is_resumed(small_disk):
    run_dir = small_disk / "run"
    ended = host(run_dir, "well", "fills", "well", flood=2**21)
    said = ended.communicate(timeout=100)[0]
    assert ended.returncode == 1 and "No space left on device" in said, said
    events, warnings = ledger.read(run_dir / ledger.NAME)
    assert warnings == [] and [result.cell.tp for result in ledger.results(events)] == [1]
    for log in run_dir.glob("cells/*/server.log"):
        log.unlink()
    resumed = host(run_dir, "--resume")
    said = resumed.communicate(timeout=100)[0]
    assert resumed.returncode == 0, said
    assert sum(line.startswith("start ") for line in said.splitlines()) == 2


def test_a_server_whose_guard_was_killed_leaves_nothing_either(tmp_path):
    """The guard's kill takes the server along; its child, in a session of its own, and its shared memory are found."""
    with lease_port() as port:
        launch = Stubs({1: ["leaks"]}).launch(cell(1), tmp_path, port, ())
        server = Server(launch, tmp_path / "server.log", Limits(start=20, stop=0.5)).start()
    words = (tmp_path / "server.log").read_text().split()
    child, shared = int(words[words.index("child") + 1]), Path("/dev/shm") / words[words.index("shm") + 1]
    assert psutil.pid_exists(child) and shared.exists()
    next(p for p in psutil.Process().children() if "harness.server.guard" in p.cmdline()).send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while server.failure() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert server.failure().cause is Cause.KILLED
    server.stop()
    assert not shared.exists()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def memory_group():
    """A control group that lends 96 MB; only root may make one."""
    old = Path("/sys/fs/cgroup/memory")
    folder = (old if old.is_dir() else old.parent) / f"helix-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(96 * 2**20))
    except OSError as problem:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"a control group cannot be made here: {problem}")
    yield folder
    until = time.monotonic() + 10
    while (folder / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    folder.rmdir()


def test_memory_is_a_limit_of_a_servers_own_control_group(tmp_path, memory_group):
    """One that eats all of its group's memory is out of memory, and not tried again; one that does not, passes."""
    prefix = ("sh", "-c", f'echo $$ > {memory_group}/cgroup.procs && exec "$@"', "sh")
    found = play(tmp_path / "run", {1: ["eats"], 2: ["well"]}, prefix=prefix)
    assert (found[1].verdict, found[1].attempts, found[2].verdict) == (Verdict.ERROR, 1, Verdict.PASS)
    assert "out of memory: guard: out of memory: the kernel killed a process of this server's control group" in (
        found[1].reason
    )


@pytest.mark.parametrize(
    ("group", "file"), [("9:memory:/a/b\n0::/x\n", "memory/a/b/memory.oom_control"), ("0::/a/b\n", "a/b/memory.events")]
)
def test_kills_are_counted_of_the_servers_own_group_alone(tmp_path, group, file):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "7").mkdir(parents=True)
    (proc / "7/cgroup").write_text(group)
    (proc / "vmstat").write_text("oom_kill 4\n")
    counter = groups / file
    counter.parent.mkdir(parents=True)
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    kills = MemoryKills(7, proc, groups)
    (proc / "vmstat").write_text("oom_kill 9\n")
    (proc / "7/cgroup").write_text(re.sub(r":/.*", ":/", group))  # as the kernel shows one that is ending
    (groups / file).parents[2].joinpath(Path(file).name).write_text("oom_kill 9\n")
    kills.look()
    assert kills.told() == ""  # somebody else's
    counter.write_text("oom_kill 3\n")
    assert kills.told() == "out of memory: the kernel killed a process of this server's control group"
    counter.unlink()
    assert kills.told() == "out of memory: the kernel killed a process of this host meanwhile"


def test_a_full_disk_ends_a_run_with_what_is_kept_and_how_to_go_on(small_disk):
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 3 * 4096))
    done = smoke(small_disk / "run", "--suite", "helix-mla", "--cell", "hopper/*")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "No space left on device" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    events, warnings = ledger.read(small_disk / "run" / ledger.NAME)
    assert warnings == [] and all(event["event"] for event in events)
    (small_disk / "filler").unlink()
    again = [sys.executable, "-m", "harness", "--resume", str(small_disk / "run")]
    resumed = subprocess.run(again, capture_output=True, text=True, timeout=100, cwd=HOST.parents[2])
    assert resumed.returncode in (0, 2), resumed.stderr  # 2: not even the first line was written


def test_a_read_only_folder_is_refused_before_anything_starts(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = smoke(small_disk / "run", "--suite", "smoke")
    assert done.returncode == 2
    assert f"cannot write into {small_disk}/run: Read-only file system; name another folder" in done.stderr
