"""Leases across processes: held alone, back from the dead, and small requests starve no large one."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness import lease as leases
from harness.cell import Cell, Mode
from harness.executors.local import LocalExecutor
from harness.gpus import GpuMemory, visible
from harness.lease import Cancelled, Host
from harness.matrix import PlannedCell
from harness.need import GIB, Need, Room, fit, host_memory, need_of
from harness.verdict import Verdict

ROOM = Room(gpus=("GPU-a", "GPU-b", "GPU-c"), cores=4, memory_bytes=8 * GIB)
HOLDER = """
import os, subprocess, sys, time
from harness.lease import Host
from harness.need import Need, Room
host = Host(Room(gpus=("GPU-a", "GPU-b", "GPU-c"), cores=4, memory_bytes=8 * 2**30))
lease = host.take(Need(gpus=2, cores=3, memory_bytes=2**30))
child = None
if sys.argv[1] == "with-guard":
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lease.descriptor,))
print(*lease.gpus, child.pid if child else 0, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_LEASES", str(tmp_path / "leases"))
    return tmp_path / "leases"


@pytest.fixture
def holder():
    """`holder(how)`: another process that holds two GPUs and three cores; (its process, its child's pid)."""
    made: list[subprocess.Popen] = []

    def hold(how: str = "alone") -> tuple[subprocess.Popen, int]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, how], stdout=subprocess.PIPE, text=True)
        made.append(process)
        said = process.stdout.readline().split()
        assert said[:2] == ["GPU-a", "GPU-b"]
        return process, int(said[2])

    yield hold
    for process in made:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_process_has_the_rest(holder):
    holder()
    host = Host(ROOM)
    assert host.take(Need(gpus=2, cores=1)) is None
    assert host.take(Need(gpus=1, cores=2)) is None
    lease = host.take(Need(gpus=1, cores=1))
    assert lease.gpus == ("GPU-c",) and lease.port in leases.PORTS
    assert lease.release() is None


def test_what_a_killed_holder_had_comes_back(holder, folder):
    process, _ = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    lease = Host(ROOM).take(Need(gpus=3, cores=4, memory_bytes=8 * GIB))
    assert lease.gpus == ("GPU-a", "GPU-b", "GPU-c")
    lease.release()
    assert list(folder.glob("lease-*")) == []


def test_a_guard_keeps_the_lease_of_its_killed_harness(holder):
    process, child = holder("with-guard")
    process.send_signal(signal.SIGKILL)
    process.wait()
    host = Host(ROOM)
    assert host.take(Need(gpus=2)) is None
    os.kill(child, signal.SIGKILL)
    assert host.wait(Need(gpus=2), threading.Event()).release() is None


def test_memory_is_counted():
    host = Host(ROOM)
    first = host.take(Need(memory_bytes=5 * GIB))
    assert host.take(Need(memory_bytes=4 * GIB)) is None
    second = host.take(Need(memory_bytes=3 * GIB))
    assert first and second and first.port != second.port
    first.release()
    second.release()


def test_a_lack_is_told_with_its_arithmetic():
    host = Host(ROOM)
    with pytest.raises(ValueError, match="needs 4 GPUs; this host lends 3"):
        host.take(Need(gpus=4))
    with pytest.raises(ValueError, match=r"needs 9\.0 GiB of memory \(1 \+ 8\); this host has 8\.0 GiB"):
        host.take(Need(memory_bytes=9 * GIB, why="1 + 8"))


def test_a_request_that_waited_is_not_starved_by_small_ones(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    host, cancel = Host(ROOM), threading.Event()
    small = host.take(Need(cores=1))
    found: list = []
    large = threading.Thread(target=lambda: found.append(host.wait(Need(cores=4), cancel)))
    large.start()
    until = time.monotonic() + 20
    while not list(leases.lease_folder().glob("want-*")) and time.monotonic() < until:
        time.sleep(0.02)
    assert host.take(Need(cores=1)) is None  # three cores are free, and kept for who came first
    small.release()
    large.join(20)
    assert found[0].need.cores == 4
    found[0].release()
    assert list(leases.lease_folder().glob("want-*")) == []


def test_a_record_of_another_version_is_honoured_as_far_as_it_is_understood(folder):
    host = Host(ROOM)
    folder.mkdir(exist_ok=True)
    locks = []
    for number, text in enumerate(('{"cores": 3, "gpus": ["GPU-a"], "more": 1}', "[]", '{"cores": "x"}', "not json")):
        path = folder / f"lease-1-{number}.json"
        path.write_text(text)
        locks.append(path.open())
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    assert host.take(Need(cores=2)) is None  # of four, three are held by the first
    lease = host.take(Need(cores=1, gpus=1))
    assert lease.gpus == ("GPU-b",)
    lease.release()
    for lock in locks:
        lock.close()


def test_a_lease_is_given_back_even_where_its_gpus_cannot_be_read(monkeypatch, folder):
    host = Host(ROOM)
    lease = host.take(Need(gpus=3))

    def lost(_gpu):
        raise OSError("the driver went away")

    monkeypatch.setattr(leases, "memory_of", lost)
    with pytest.raises(OSError, match="driver went away"):
        lease.release(patience=0.0)
    monkeypatch.undo()
    monkeypatch.setenv("HELIX_LEASES", str(folder))
    again = host.take(Need(gpus=3))
    assert again is not None
    again.release()


def test_waiting_can_be_cancelled():
    host, cancel = Host(ROOM), threading.Event()
    held = host.take(Need(cores=4))
    cancel.set()
    with pytest.raises(Cancelled):
        host.wait(Need(cores=1), cancel)
    held.release()


def test_a_gpu_that_keeps_its_memory_is_quarantined_until_it_is_free(monkeypatch):
    used = {"GPU-a": 1 * GIB, "GPU-b": 0, "GPU-c": 0}
    monkeypatch.setattr(leases, "memory_of", lambda gpu: GpuMemory(used[gpu], 80 * GIB))
    host = Host(ROOM)
    lease = host.take(Need(gpus=2))
    used["GPU-a"] = 30 * GIB
    told = lease.release(patience=0.0)
    assert "GPU GPU-a still uses 30.0 of 80.0 GiB" in told and "GPU-b" not in told
    again = host.take(Need(gpus=2))
    assert again.gpus == ("GPU-b", "GPU-c")
    assert again.release(patience=0.0) is None
    used["GPU-a"] = 1 * GIB + 2**20
    assert host.take(Need(gpus=3)).release(patience=0.0) is None


def test_cells_that_share_a_gpu_lie_side_by_side_up_to_the_whole_of_it():
    host = Host(ROOM)
    first, second = host.take(Need(gpus=1, share=0.6)), host.take(Need(gpus=1, share=0.4))
    assert first.gpus == second.gpus == ("GPU-a",)
    third, whole = host.take(Need(gpus=1, share=0.4)), host.take(Need(gpus=1))
    assert (third.gpus, whole.gpus) == (("GPU-b",), ("GPU-c",))
    assert host.take(Need(gpus=1)) is None  # of each GPU a part is held
    for lease in (first, second, third, whole):
        assert lease.release(patience=0.0) is None
    assert host.take(Need(gpus=3)).release(patience=0.0) is None


def test_memory_of_a_shared_gpu_is_asked_of_the_last_that_leaves_it(monkeypatch):
    used = 1 * GIB
    monkeypatch.setattr(leases, "memory_of", lambda gpu: GpuMemory(used, 80 * GIB))
    host = Host(ROOM.model_copy(update={"gpus": ("GPU-a",)}))
    first = host.take(Need(gpus=1, share=0.5))
    used = 20 * GIB
    second = host.take(Need(gpus=1, share=0.5))
    assert first.release(patience=0.0) is None  # the other still computes there
    told = second.release(patience=0.0)  # what was there before both of them is 1 GiB
    assert "still uses 20.0 of 80.0 GiB" in told
    assert host.take(Need(gpus=1, share=0.1)) is None
    used = 1 * GIB
    assert host.take(Need(gpus=1, share=0.1)).release(patience=0.0) is None


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("", ()),
        ("1", ("GPU-bb",)),
        ("2,0", ("GPU-cc", "GPU-aa")),
        ("GPU-c,GPU-aa", ("GPU-cc", "GPU-aa")),
        ("0,7,1", ("GPU-aa",)),  # as CUDA does: the first that names nothing ends the list
        ("MIG-x", ("MIG-x",)),
    ],
)
def test_leases_stay_inside_cuda_visible_devices(asked, found):
    assert visible(asked, ["GPU-aa", "GPU-bb", "GPU-cc"]) == found


def cell(tp: int, **fields) -> Cell:
    return Cell(mode=Mode.STANDARD_TP, backend="CPU_ATTN", hardware="cpu", model="recipe:llama-k4", tp=tp, **fields)


def test_what_cells_need():
    need = need_of(cell(8, serve=(("kv-cache-memory-bytes", 2**29),)), cores=2)
    assert (need.gpus, need.cores, need.memory_bytes) == (0, 2, 1 * GIB + 8 * 1 * GIB)
    assert need.why == "1.0 GiB + 8 ranks x 1.00 GiB"
    gpu = cell(4).model_copy(update={"hardware": "hopper"})
    assert need_of(gpu, 16).gpus == 4
    assert need_of(gpu.model_copy(update={"helix": (("share_gpu", True),)}), 16).gpus == 1
    part = (("gpu-memory-utilization", 0.25), ("kv-cache-memory-bytes", 2**29))
    assert need_of(gpu, 16).share == 1.0
    assert need_of(gpu.model_copy(update={"serve": part[:1]}), 16).share == 1.0, "vLLM would measure the free memory"
    assert need_of(gpu.model_copy(update={"serve": part}), 16).share == 0.25
    shared = need_of(gpu.model_copy(update={"serve": part, "helix": (("share_gpu", True),)}), 16)
    assert (shared.gpus, shared.share, shared.cores) == (1, 0.25, 2)
    assert need_of(gpu.model_copy(update={"serve": part, "tp": 1}), 16).share == 0.25


def test_a_cell_beyond_the_host_is_skipped_with_what_is_compared_with_it():
    big, small = cell(8, serve=(("kv-cache-memory-bytes", 2**30),)), cell(1, serve=(("kv-cache-memory-bytes", 2**30),))
    follows = small.model_copy(update={"serve": (("kv-cache-memory-bytes", 2**20),)})
    common = {"suites": ("s",), "declared": Verdict.PASS, "declared_why": ""}
    plan = [
        PlannedCell(cell=big, **common), PlannedCell(cell=small, **common),
        PlannedCell(cell=follows, baseline=big, **common),
    ]  # fmt: skip
    skips = [item.skip for item in fit(plan, Room(cores=2, memory_bytes=4 * GIB))]
    assert skips[0] == ("needs 13.0 GiB of memory (1.0 GiB + 8 ranks x 1.50 GiB); this host has 4.0 GiB")
    assert skips[1] is None
    assert skips[2].startswith("its baseline") and "needs 13.0 GiB" in skips[2]


def test_memory_is_the_least_of_host_and_control_groups(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "cg/a/b").mkdir(parents=True)
    assert host_memory(tmp_path / "proc", tmp_path / "cg") == 16 * GIB
    (tmp_path / "cg/a/b/memory.max").write_text("max\n")
    (tmp_path / "cg/a/memory.max").write_text(f"{2 * GIB}\n")
    assert host_memory(tmp_path / "proc", tmp_path / "cg") == 2 * GIB


def gpu_cell(tp: int) -> Cell:
    return cell(tp).model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})


def test_a_part_of_gpus_that_is_waited_for_keeps_no_more_than_that_part(monkeypatch):
    """A request for parts of both GPUs lacks cores only: what is left of the GPUs is lent; a whole one is not."""
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    host = Host(Room(gpus=("GPU-0", "GPU-1"), cores=8))
    busy = host.take(Need(cores=6))
    with leases.Ticket(Need(gpus=2, share=0.3, cores=3)) as first:
        first.age()
        assert host.take(first.need, first) is None
        assert host.take(Need(gpus=1, share=0.5, cores=1)) is None, "cores are kept for the first"
        busy.release()
        small = host.take(Need(gpus=1, share=0.7, cores=1))
        assert small is not None and host.take(Need(gpus=1, share=1.0, cores=1)) is None
        assert host.take(Need(gpus=1, share=0.8, cores=1)) is None
        granted = host.take(first.need, first)
        assert set(granted.gpus) == {"GPU-0", "GPU-1"}
    for lease in (small, granted):
        lease.release(patience=0.0)


def test_what_waits_for_a_whole_gpu_gets_the_emptiest(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    host = Host(Room(gpus=("GPU-0", "GPU-1"), cores=8))
    full, half = host.take(Need(gpus=1, share=0.9)), host.take(Need(gpus=1, share=0.5))
    assert full.gpus != half.gpus
    with leases.Ticket(Need(gpus=1)) as first:
        first.age()
        assert host.take(first.need, first) is None
        assert host.take(Need(gpus=1, share=0.2)) is None, "the emptiest is to come free"
        beside = host.take(Need(gpus=1, share=0.1))
        assert beside.gpus == full.gpus
        half.release(patience=0.0)
        whole = host.take(first.need, first)
        assert whole.gpus == half.gpus
    for lease in (full, beside, whole):
        lease.release(patience=0.0)


def test_what_no_lease_can_be_written_for_keeps_nothing_waiting(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    host = Host(Room(gpus=("GPU-0", "GPU-1"), cores=8))
    executor, running = LocalExecutor(host=host), host.take(Need(gpus=1))
    assert executor.reserve(gpu_cell(2)) is False and executor.reserve(gpu_cell(1)) is None
    running.release()
    with monkeypatch.context() as full:
        full.setattr(leases, "lease_port", lambda: (_ for _ in ()).throw(RuntimeError("no free port")))
        assert executor.reserve(gpu_cell(2)) is True, "its attempt says what is wrong"
    assert executor.reserve(gpu_cell(1)) is True
    executor.give_back()


def test_what_waits_for_a_quarantined_gpu_keeps_no_other_waiting(monkeypatch):
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    monkeypatch.setattr(leases, "_quarantined", lambda: {"GPU-0"})
    executor = LocalExecutor(host=Host(Room(gpus=("GPU-0", "GPU-1"), cores=8)))
    assert executor.reserve(gpu_cell(2)) is False and executor.reserve(gpu_cell(1)) is True
    other = LocalExecutor(host=Host(Room(gpus=("GPU-0", "GPU-1"), cores=8)))
    executor._reserved.popitem()[1].release()
    assert other.reserve(gpu_cell(1)) is True
    for one in (executor, other):
        one.give_back()


def test_a_scheduler_that_waits_is_served_before_later_ones(monkeypatch):
    """Between two looks of the first, the second never gets what the first waits for; its own small cells wait too."""
    monkeypatch.setattr(leases, "PATIENCE", 0.0)
    first, second = (LocalExecutor(host=Host(Room(cores=4, memory_bytes=64 * GIB))) for _ in range(2))
    running = second.host.take(Need(cores=2))
    assert not first.reserve(cell(4)) and not first.reserve(cell(4))
    assert first.reserve(cell(1)) is None, "not even tried"
    running.release()
    assert not second.reserve(cell(1))
    assert first.reserve(cell(4))
    assert not second.reserve(cell(1))
    first.give_back()
    assert second.reserve(cell(1))
    second.give_back()
