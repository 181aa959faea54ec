"""One server over several hosts: what is started on each, and what a headless host gives back. Stub servers."""

import sys

from test_executor import CELL
from test_server import launch

from harness.executors.spread import Part, follow_along, lead
from harness.lease import Host
from harness.matrix import baseline_of
from harness.need import GIB, Need, Room
from harness.server.launch import make_launch
from harness.server.log import Cause
from harness.server.place import Processes
from harness.server.process import Limits
from helix_runtime.proof import ProofWriter

LIMITS = Limits(start=20, stop=0.3)
ROOM = Room(cores=8, memory_bytes=2**40)
FIRST, SECOND = (
    Part(number=number, hosts=2, ranks=1, own=f"10.0.0.{number}", master="10.0.0.0", port=4000) for number in (0, 1)
)
MEET = ["--distributed-executor-backend", "mp", "--nnodes", "2"]


class Stubs(Processes):
    def __init__(self, behaviour: str):
        self.behaviour, self.seen = behaviour, []

    def launch(self, cell, folder, port, gpus):
        ProofWriter(folder / "proof", 0)
        return launch(self.behaviour, port).model_copy(update={"proof_dir": folder / "proof"})


def test_every_host_is_told_its_place_and_where_the_ranks_meet(tmp_path):
    whole = make_launch(CELL.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"}), tmp_path, 21000)
    first, second = FIRST.onto(whole), SECOND.onto(whole)
    where = ["--master-addr", "10.0.0.0", "--master-port", "4000"]
    assert list(first.argv) == [*whole.argv, *MEET, "--node-rank", "0", *where]
    assert list(second.argv) == [*whole.argv, *MEET, "--node-rank", "1", *where, "--headless"]
    assert dict(first.env)["VLLM_HOST_IP"] == "10.0.0.0" and dict(second.env)["VLLM_HOST_IP"] == "10.0.0.1"


def test_a_stock_cpu_host_is_headless_by_a_command_that_knows_the_word(tmp_path):
    whole = make_launch(baseline_of(CELL), tmp_path, 21000)
    assert "vllm.entrypoints.openai.api_server" in FIRST.onto(whole).argv
    words = list(SECOND.onto(whole).argv)
    assert words[:6] == [sys.executable, "-m", "harness.server.fork_start", "helix_runtime.serve", "serve", whole.model]
    assert dict(SECOND.onto(whole).env)["VLLM_PLUGINS"] == ""  # still stock


def test_a_host_takes_its_share():
    whole = Need(gpus=16, cores=16, memory_bytes=8 * GIB, why="w")
    share = Part(number=0, hosts=2, ranks=8, own="a", master="a", port=1).need(whole)
    assert (share.gpus, share.cores, share.memory_bytes) == (8, 8, 4 * GIB)
    assert FIRST.need(Need(cores=1, memory_bytes=2)).gpus == 0


def test_a_headless_host_runs_until_the_first_has_ended():
    looks = iter([False, False, True])
    followed = follow_along(CELL, SECOND, LIMITS, ROOM, Stubs("silent"), lambda: next(looks))
    assert followed.failure is None and "server.log" in followed.files and list(looks) == []


def test_a_headless_host_that_gets_no_room_ends_with_the_first():
    held = Host(ROOM).take(Need(cores=8))
    try:
        followed = follow_along(CELL, SECOND, LIMITS, ROOM, Stubs("silent"), lambda: True)
    finally:
        held.release()
    assert followed.failure is None and followed.files == {}


def test_a_headless_host_whose_ranks_end_says_why():
    followed = follow_along(CELL, SECOND, LIMITS, ROOM, Stubs("refused"), lambda: False)
    assert followed.failure.cause is Cause.REFUSED


def test_the_first_host_answers_with_its_share_of_the_room():
    cell = CELL.model_copy(update={"hardware": "hopper", "backend": "FLASH_ATTN"})
    room = Room(gpus=("0",), cores=8, memory_bytes=2**40)  # the whole cell takes two
    served = lead(cell, None, True, FIRST, LIMITS, room, Stubs("well"))
    assert served.attempt.failure is None and served.attempt.transcript is not None
