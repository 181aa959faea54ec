"""One server over several hosts, by vLLM's own multi-node start: host 0 answers, the others run their ranks headless.

Stock vLLM 0.32: `--nnodes N --node-rank K --master-addr A --master-port P`, and `--headless` on all but the first. A
headless host does not notice that the first one has ended (seen), so it is told.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.cell import Cell
from harness.executors.lent import Served, attempt_here, files_of
from harness.executors.local import LocalExecutor
from harness.frozen import Frozen
from harness.lease import Host, Lease, Ticket
from harness.need import Need, Room
from harness.server.launch import Launch
from harness.server.log import Failure
from harness.server.place import Place, Processes, make_place
from harness.server.process import Limits, Server, ServerFailed
from harness.transcript import Transcript
from helix_runtime.proof import RankProof, read_proofs

#: vLLM's server module on CPU, which knows no `--headless`; `helix serve` does, and loads no hook of ours by itself.
_STOCK_CPU = "vllm.entrypoints.openai.api_server"
_LOOK = 0.5  # seconds between looks at whether the first host has ended


class Part(Frozen):
    """Host `number` of `hosts`, with `ranks` of the cell's ranks. `master` and `port`: where the ranks meet."""

    number: int
    hosts: int
    ranks: int
    own: str
    master: str
    port: int

    def onto(self, launch: Launch) -> Launch:
        """What is started on this host for the server that `launch` would start on one."""
        words = list(launch.argv)
        if self.number and _STOCK_CPU in words:
            at = words.index(_STOCK_CPU)
            words[at : at + 2] = ["helix_runtime.serve", "serve"]  # the next word is --model
        words += ["--distributed-executor-backend", "mp", "--nnodes", str(self.hosts), "--node-rank", str(self.number)]
        words += ["--master-addr", self.master, "--master-port", str(self.port)]
        words += ["--headless"] if self.number else []
        env = {**dict(launch.env), "VLLM_HOST_IP": self.own}
        return launch.model_copy(update={"argv": tuple(words), "env": tuple(sorted(env.items()))})

    def need(self, whole: Need) -> Need:
        """This host's share of what the cell takes."""
        gpus = self.ranks if whole.gpus else 0
        cores, memory = max(whole.cores // self.hosts, 1), whole.memory_bytes // self.hosts
        return Need(
            gpus=gpus, share=whole.share, cores=cores, memory_bytes=memory, why=f"1/{self.hosts} of {whole.why}"
        )


class _Shared(Processes):
    """`inner`, with what a part of a server adds."""

    def __init__(self, inner: Place, part: Part):
        self.inner, self.part = inner, part

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        return self.part.onto(self.inner.launch(cell, folder, port, gpus))


class _First(LocalExecutor):
    """Host 0: as one host, with its share of what the cell takes."""

    def __init__(self, part: Part, limits: Limits, place: Place, host: Host):
        super().__init__(limits, _Shared(place, part), host)
        self.part = part

    def _need(self, cell: Cell, ask: bool) -> Need:
        return self.part.need(super()._need(cell, ask=True))


class _Headless(Server):
    """Ranks that answer no one: up as soon as the process is."""

    def _wait_ready(self) -> None:
        self.check()


class Followed(Frozen):
    """What a headless host leaves. `failure`: why it ended before it was told to, or None."""

    failure: Failure | None
    files: dict[str, bytes]
    proofs: tuple[RankProof, ...]
    host: str


def free_port(address: str) -> int:
    """A port of this host at which the ranks may meet. One that is taken in between fails the start by name."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def lead(
    cell: Cell, follow: Transcript | None, ask: bool, part: Part, limits: Limits, room: Room | None,
    place: Place | None,
) -> Served:  # fmt: skip
    """As `lent.serve`, on host 0 of several."""
    executor = _First(part, limits, place or make_place("process"), Host(room) if room else Host())
    return attempt_here(executor, cell, follow, ask)


def follow_along(
    cell: Cell, part: Part, limits: Limits, room: Room | None, place: Place | None, over: Callable[[], bool]
) -> Followed:
    """The ranks of a host that is not the first, until `over` says so or they end."""
    executor = _First(part, limits, place or make_place("process"), Host(room) if room else Host())
    with tempfile.TemporaryDirectory(prefix="helix-cell-") as scratch:
        folder = Path(scratch) / "cell"
        folder.mkdir()
        lease = _leased(executor, cell, over)
        if lease is None:
            return Followed(failure=None, files={}, proofs=(), host=os.uname().nodename)
        failure, server = None, None
        try:
            launch = executor.place.launch(cell, folder, lease.port, lease.gpus)
            server = _Headless(launch, folder / "server.log", limits, lease=lease.descriptor)
            server.start()
            while not over():
                server.check()
                time.sleep(_LOOK)
        except ServerFailed as failed:
            failure = failed.failure
        finally:
            if server is not None:
                server.stop()
            lease.release()
        proofs = tuple(read_proofs(folder / "proof")) if (folder / "proof").is_dir() else ()
        return Followed(failure=failure, files=files_of(folder), proofs=proofs, host=os.uname().nodename)


def _leased(executor: _First, cell: Cell, over: Callable[[], bool]) -> Lease | None:
    """This host's share as soon as others give it back; None where the first host ended before that."""
    need = executor._need(cell, True)
    with Ticket(need) as ticket:
        while (lease := executor.host.take(need, ticket)) is None:
            if over():
                return None
            ticket.age()
            time.sleep(_LOOK)
    return lease
