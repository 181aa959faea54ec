"""Hosts of a simulated fleet, a process each: `FOLDER COUNT GPUS`. Each prints `number pid` once it can be reached.

A host does for a cell what a host of a cluster does (`harness.executors.lent.serve`: lease, start, ask over HTTP, stop,
send back what is left), on servers that are stubs in its own process. All end when their standard input is closed.
"""

import asyncio
import contextlib
import functools
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import NamedTuple

from harness import lease
from harness.cell import Cell
from harness.executors import local
from harness.executors.lent import serve
from harness.frozen import Frozen
from harness.need import Room
from harness.oracle.proof import wanted_combine
from harness.server.launch import Launch
from harness.server.place import Processes
from harness.server.process import Limits, Server
from harness.transcript import Transcript
from helix_runtime.proof import ProofWriter, RankProof

VOCAB = 512
KEY = "key"
KV_TOKENS = 21_824
NOISE, WRONG = 0.02, 3.0  # nats: standard deviations of what servers differ by
STOPS = {"dies": 3, "killed": 128 + signal.SIGKILL}  # the status that a guard gives then


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """Where the servers of this process run. Never one from before a fork: its epoll would be all hosts' together."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


class Stub(Frozen):
    """How a server behaves: `well`, `wrong` (noise that no rounding makes), `dies` (while it answers) or `killed`
    (from outside, before it is ready). Seconds until it is ready, of a decode step, and until it has stopped."""

    salt: str
    start: float
    step: float
    stop: float
    behaviour: str = "well"


class Order(NamedTuple):
    """One attempt, as the driver sends it."""

    cell: Cell
    follow: Transcript | None
    stub: Stub


class Stubs(Processes):
    def __init__(self, stub: Stub):
        self.stub = stub

    def launch(self, cell: Cell, folder: Path, port: int, gpus: tuple[str, ...]) -> Launch:
        if not cell.baseline:
            prove(cell, folder / "proof")
        return Launch(
            argv=("stub", self.stub.model_dump_json()), env=(), name=f"stub-{cell.key}", api_key=KEY, port=port,
            model=cell.model, proof_dir=folder / "proof",
        )  # fmt: skip


class Running:
    """A stub server that runs, with what `subprocess.Popen` has of the guard of a real one."""

    def __init__(self, launch: Launch, log: Path):
        self.stub = Stub.model_validate_json(launch.argv[1])
        self.launch, self.log = launch, log
        self.returncode: int | None = None
        self.generated = 0
        self.asked: dict[tuple[int, ...], int] = {}
        self.ended = threading.Event()
        self.stdin = self  # it is told to stop there
        self.loaded = asyncio.Event()
        asyncio.run_coroutine_threadsafe(self._listen(), loop()).result()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("stub", timeout or 0)
        return self.returncode or 0

    def write(self, told: bytes) -> None:
        loop().call_soon_threadsafe(loop().call_later, self.stub.stop if told == b"stop\n" else 0, self._end, 0)

    def kill(self) -> None:
        self.write(b"kill\n")

    def flush(self) -> None: ...

    def close(self) -> None: ...

    async def _listen(self) -> None:
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", self.launch.port, backlog=64)
        loop().call_later(self.stub.start, self._load)

    def _load(self) -> None:
        if self.stub.behaviour == "killed":
            return self._end(STOPS["killed"])
        self.log.write_text(f"INFO: GPU KV cache size: {KV_TOKENS:,} tokens, with room\n")
        self.loaded.set()

    def _end(self, status: int) -> None:
        if self.returncode is None:
            self.server.close()
            self.returncode = status
            self.ended.set()
            self.loaded.set()  # whoever waits is sent away

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. Until it is loaded, who asks waits, as that costs nothing; a real server takes no connection."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            body = json.loads(await reader.readexactly(int(length[1]))) if length else {}
            await self.loaded.wait()
            if self.returncode is not None:
                return
            allowed = f"bearer {KEY}\r" in head.lower()
            status, said = await self._answer(head.split()[1], body) if allowed else (401, b"{}")
            if self.returncode is None:
                writer.write(b"HTTP/1.1 %d .\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(said)))
                writer.write(said)
                await writer.drain()

    async def _answer(self, path: str, body: dict) -> tuple[int, bytes]:
        if path == "/metrics":
            counts = {"generation_tokens": self.generated, "prefix_cache_hits": 7, "num_preemptions": 0}
            return 200, "".join(f"vllm:{name}_total {value}.0\n" for name, value in counts.items()).encode()
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": self.launch.name}]}).encode()
        if len(body["prompt"]) > 1:
            if self.stub.behaviour == "dies":
                self.log.write_text(f"{self.log.read_text()}ValueError: the engine fell over\n")
                self._end(STOPS["dies"])
                return 500, b""
            await asyncio.sleep(self.stub.step * body["max_tokens"])
        self.generated += body["max_tokens"]
        return 200, json.dumps({"choices": [self._completion(body)]}).encode()

    def _completion(self, body: dict) -> dict:
        """Top logprobs that depend on all tokens so far, with a noise of this server's own."""
        prompt, forced = tuple(body["prompt"]), (body.get("vllm_xargs") or {}).get("helix_forced_tokens", [])
        times = self.asked[prompt] = self.asked.get(prompt, 0) + 1
        dice = random.Random(f"{self.stub.salt} {prompt} {times}")
        noise = WRONG if self.stub.behaviour == "wrong" else NOISE
        seen, tokens, tops = sum(prompt), [], []
        for position in range(body["max_tokens"]):
            first = seen + 7 * position
            top = {(first + rank) % VOCAB: -3.0 - 0.1 * rank - abs(dice.gauss(0, noise)) for rank in range(20)}
            tokens.append(forced[position] if position < len(forced) else max(top, key=top.__getitem__))
            tops.append({tokens[-1]: -9.0, **top})
            seen += tokens[-1]
        named = [{f"token_id:{token}": value for token, value in top.items()} for top in tops]
        chosen = [top[token] for token, top in zip(tokens, tops, strict=True)]
        return {"token_ids": tokens, "logprobs": {"token_logprobs": chosen, "top_logprobs": named}}


class StubServer(Server):
    """The real client's view of a server, with a stub behind it."""

    def _cold(self, log) -> Running:
        return Running(self.launch, self.log)


def prove(cell: Cell, folder: Path) -> None:
    """What the workers of a right server of `cell` write: every token on one rank of each group of KVP ranks."""
    for rank in range(cell.tp):
        group = tuple(range(rank - rank % cell.kvp, rank - rank % cell.kvp + cell.kvp))
        writer = ProofWriter(folder, rank)
        writer.ran("decode")
        writer.count("local_tokens", 1000)
        writer.count("global_tokens", 1000 * cell.kvp)
        writer.identify(RankProof(
            rank=rank, tp=cell.tp, kvp=cell.kvp, tpa=cell.tpa, kvp_rank=rank % cell.kvp, tpa_rank=rank // cell.kvp,
            helix=cell.mode.helix, backend=cell.backend, impl="stub", combine=wanted_combine(cell), combine_impl="stub",
            group_size=cell.kvp, group_ranks=group, interleave=cell.interleave, lse_base="e", model_runner="stub",
            vllm_version=cell.vllm_version, self_test="ok",
        ))  # fmt: skip


def work(line: Connection, room: Room) -> None:
    """One attempt: the order in; what `serve` gives, or raises, out."""
    with line:
        order: Order = line.recv()
        try:
            line.send(serve(order.cell, order.follow, True, "process", Limits(stop=1), room, Stubs(order.stub)))
        except Exception as problem:
            line.send(problem)


def host(number: int, count: int, folder: Path, gpus: int) -> None:
    """Take orders on a socket for ever. Leases are this host's own, ports a share of those of the machine."""
    os.setsid()  # Linux shares out cores by session: a host is not to wait for the others, nor the driver for it
    os.environ["HELIX_LEASES"] = str(folder / f"leases-{number}")
    share = len(lease.PORTS) // count
    ports = lease.PORTS[number * share : (number + 1) * share]
    lease.lease_port = functools.partial(lease.lease_port, ports)
    local.Server = StubServer
    loop()
    room = Room(gpus=tuple(f"host-{number}-gpu-{gpu}" for gpu in range(gpus)), cores=64, memory_bytes=2**40)
    with Listener(str(folder / str(number)), backlog=64) as listener:
        os.write(1, f"{number} {os.getpid()}\n".encode())
        while True:
            threading.Thread(target=work, args=(listener.accept(), room), daemon=True).start()


def main() -> None:
    folder, count, gpus = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    gc.freeze()  # what was imported is shared by all
    hosts = []
    for number in range(count):
        hosts.append(os.fork())
        if not hosts[-1]:
            host(number, count, folder, gpus)
    sys.stdin.read()
    for pid in hosts:  # not yet waited for, so the number is still theirs
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
