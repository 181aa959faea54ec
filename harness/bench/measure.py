"""Runs the rounds of a bench cell: both servers under the same loads in turns, every finished round kept in a file.

Even rounds take the cell first, odd ones the baseline, so that a host that slows down slows both. A round whose file
is there is not run again: an interrupted measurement goes on where it stopped.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx

from harness.bench.load import Generator, arguments
from harness.bench.result import KvCapacity
from harness.bench.spec import BenchSpec, Load
from harness.cell import Cell
from harness.lease import Host, Lease, lease_port
from harness.need import Need, need_of
from harness.server.launch import Launch
from harness.server.log import Cause, Failure, kv_cache_tokens, read_log
from harness.server.place import Place, Processes
from harness.server.process import ON_LOOPBACK, Limits, Server, ServerFailed

CELL, BASELINE = "cell", "baseline"
Progress = Callable[[str], None]
#: A worker's own word, for servers whose metrics leave the bytes out.
_KV_MEMORY = re.compile(r"Available KV cache memory: ([\d.]+) GiB")


class Slot(NamedTuple):
    """One round of one load on one side, and the file that `vllm bench serve` writes for it."""

    round: int
    side: str
    load: Load
    seed: int
    file: Path


class Where(NamedTuple):
    """What servers run on: leases of this host, a place, deadlines, and the word that ends it all."""

    cancel: threading.Event
    place: Place = Processes()
    host: Host | None = None
    limits: Limits | None = None


def side_by_side(cells: Iterable[Cell]) -> bool:
    """Whether all stay up: on a CPU, and on GPUs where what they take of the memory leaves room for each other."""
    return sum(need_of(cell, 1).share for cell in cells if cell.hardware != "cpu") <= 1.0


class Sides:
    """The two servers. Where they fit `side_by_side` both stay up, and start together on GPUs, where a start is mostly
    waiting; else the other is stopped before one starts.

    One lease, held to the end, serves both, so that rounds of a cell and of its baseline run on the same GPUs.
    """

    def __init__(self, cells: dict[str, Cell], folder: Path, where: Where):
        self.cells, self.folder, self.where = cells, folder, where
        self.together = side_by_side(cells.values())
        self._up: dict[str, tuple[Server, contextlib.ExitStack]] = {}
        self._one_model = threading.Lock()  # made by the first, found by the second
        self._lease: Lease | None = None

    def __enter__(self) -> "Sides":
        host = self.where.host or Host()
        self._lease = host.wait(self._need(host.room.cores), self.where.cancel)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for side in list(self._up):
            self._stop(side)
        stuck = self._lease.release()
        if stuck and kind is None:
            raise ServerFailed(Failure(cause=Cause.GPU_MEMORY, reason=stuck))

    def _need(self, cores: int) -> Need:
        needs = [need_of(cell, cores) for cell in self.cells.values()]
        memory = (sum if self.together else max)(need.memory_bytes for need in needs)
        why = " and ".join(need.why for need in needs) if self.together else needs[0].why
        both = min(sum(need.cores for need in needs), cores) if self.together else needs[0].cores
        return needs[0].model_copy(update={"memory_bytes": memory, "why": why, "share": 1.0, "cores": both})

    def need(self, side: str) -> Server:
        """The running server of `side`. Raises ServerFailed where it does not start or has died."""
        if side not in self._up and self.together and self.cells[side].hardware != "cpu":
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._start, self.cells))
        elif side not in self._up:
            for other in () if self.together else list(self._up):
                self._stop(other)
            self._start(side)
        server = self._up[side][0]
        server.check()
        return server

    def _start(self, side: str) -> None:
        place = self.folder / side
        place.mkdir(parents=True, exist_ok=True)
        stack = contextlib.ExitStack()
        try:
            port = stack.enter_context(lease_port())
            with self._one_model:
                launch = self.where.place.launch(self.cells[side], place.absolute(), port, self._lease.gpus)
            log, limits = place / "server.log", self.where.limits or Limits()
            server = Server(undisturbed(launch), log, limits, self.where.cancel, self._lease.descriptor)
            stack.callback(server.stop)
            server.start()
        except BaseException:
            stack.close()
            raise
        self._up[side] = (server, stack)
        kv = capacity_of(server, read_log(log))
        if kv is not None:
            (place / "kv.json").write_text(kv.model_dump_json())

    def _stop(self, side: str) -> None:
        _, stack = self._up.pop(side)
        stack.close()


def slots(spec: BenchSpec, folder: Path) -> Iterator[Slot]:
    """Every round in order. Cell and baseline are asked the same prompts, other rounds other ones."""
    for number in range(spec.rounds):
        sides = (CELL, BASELINE) if number % 2 == 0 else (BASELINE, CELL)
        for side, (at, load) in itertools.product(sides, enumerate(spec.loads)):
            file = folder / "rounds" / f"{number:02d}-{load.label}-{side}.json"
            yield Slot(number, side, load, 1000 * number + at, file)


def measure(
    cells: dict[str, Cell],
    spec: BenchSpec,
    folder: Path,
    where: Where,
    progress: Progress,
) -> None:
    """Run every round of `spec` that has no file yet.

    Raises ServerFailed, LoadFailed, OSError, ValueError (this host lacks what it takes), Cancelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_question(cells, spec, folder)
    todo = [slot for slot in slots(spec, folder) if finished(slot.file) is None]
    done = sum(1 for _ in slots(spec, folder)) - len(todo)
    if done:
        progress(f"bench     {done} rounds of {cells[CELL].id} were there already")
    if not todo:
        return
    (folder / "rounds").mkdir(exist_ok=True)
    with Sides(cells, folder, where) as up, Generator(folder / "generator.log", where.cancel) as generator:
        for number, slot in enumerate(todo, done + 1):
            server = up.need(slot.side)
            partial = slot.file.with_suffix(".part")
            partial.unlink(missing_ok=True)
            generator.run(arguments(server.launch, spec, slot.load, slot.seed, partial), server.launch.api_key)
            server.check()
            partial.rename(slot.file)
            progress(f"bench     {number}/{done + len(todo)} {_told(slot)}")


def finished(file: Path) -> dict | None:
    """A round's numbers, or None where it was not run to its end."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "completed" in found else None


def undisturbed(launch: Launch) -> Launch:
    """`launch` without the processor that forces tokens: it would cost the cell what the baseline does not pay."""
    argv = list(launch.argv)
    if "--logits-processors" in argv:
        at = argv.index("--logits-processors")
        del argv[at : at + 2]
    return launch.model_copy(update={"argv": tuple(argv)})


def capacity_of(server: Server, log: str) -> KvCapacity | None:
    """The KV cache as `/metrics` tells it; what a version leaves out there is taken from its log."""
    try:
        reply = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=30, **ON_LOOPBACK)
    except httpx.TransportError:
        return None
    labels = cache_labels(reply.text)
    tokens = _number(labels.get("kv_cache_size_tokens")) or kv_cache_tokens(log)
    if tokens is None:
        return None
    return KvCapacity(
        tokens=tokens,
        blocks=_number(labels.get("num_gpu_blocks")),
        block_size=_number(labels.get("block_size")),
        bytes=_number(labels.get("kv_cache_memory_bytes")) or _logged_bytes(log),
    )


def _logged_bytes(log: str) -> int | None:
    found = _KV_MEMORY.findall(log)
    return int(float(found[-1]) * 2**30) if found else None


def cache_labels(metrics: str) -> dict[str, str]:
    """The labels of `vllm:cache_config_info`, from a page in Prometheus' text format."""
    line = next((line for line in metrics.splitlines() if line.startswith("vllm:cache_config_info{")), "")
    inside = line.partition("{")[2].rpartition("}")[0]
    pairs = (pair.partition("=") for pair in inside.split('",') if "=" in pair)
    return {name.strip(): value.strip('"') for name, _, value in pairs}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _same_question(cells: dict[str, Cell], spec: BenchSpec, folder: Path) -> None:
    """Rounds of another question are not mixed in: its folder is emptied of them."""
    asked = json.dumps({"spec": spec.model_dump(mode="json"), **{side: cell.key for side, cell in cells.items()}})
    note = folder / "question.json"
    if note.exists() and note.read_text() != asked:
        for old in (folder / "rounds").glob("*"):
            old.unlink()
    note.write_text(asked)


def _told(slot: Slot) -> str:
    found = finished(slot.file) or {}
    shown = {"tok/s": "output_throughput", "TTFT": "median_ttft_ms", "ITL": "median_itl_ms"}
    numbers = ", ".join(f"{name} {found.get(key, 0):.1f}" for name, key in shown.items())
    return f"{slot.side} {slot.load.label}: {numbers}"
