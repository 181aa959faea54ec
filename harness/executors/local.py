"""Runs one cell as processes of this host: start, ask, stop. No verdicts here."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.cell import Cell
from harness.client import answer_all
from harness.lease import Host, Lease, Ticket
from harness.models.recipe import PREFIX, shape
from harness.need import Need, need_of
from harness.result import Phase
from harness.server.log import Cause, Failure, read_log, tail
from harness.server.place import Place, Processes
from harness.server.process import Limits, Server, ServerFailed
from harness.transcript import Transcript
from harness.workload import Workload, workload_of
from helix_runtime.proof import RankProof, read_proofs

SMALL_BATCH = 3  # of a baseline's second answer


class Attempt(NamedTuple):
    """What one run of a cell's server gave.

    `failure` is why it ended early, or None; `started` is whether it was ready before that; `transcript` is None
    unless all was asked. `again` is a baseline's second answer, in other batches, where the null band needs it.
    """

    started: bool
    failure: Failure | None
    transcript: Transcript | None
    proofs: tuple[RankProof, ...]
    kv_cache_tokens: int | None
    log_tail: str
    phases: tuple[Phase, ...]
    again: Transcript | None = None


class LocalExecutor:
    """`cancel` stops what runs; `end_all` kills it. `host` lends what servers take; `place` is where they run."""

    def __init__(self, limits: Limits | None = None, place: Place | None = None, host: Host | None = None):
        self.limits = limits or Limits()
        self.place = place or Processes()
        self.host = host or Host()
        self.cancel = threading.Event()
        self._live: set[Server] = set()
        self._reserved: dict[str, Lease] = {}  # by cell key, for the next attempt
        self._waiting: Ticket | None = None  # for what could not be leased first

    def reserve(self, cell: Cell, ask: bool = True) -> bool | None:
        """Lease what the next attempt at `cell` takes; False while others hold it. A lack is left to the attempt.

        None: it was not tried, since what has waited long comes first, unless a quarantined GPU keeps that waiting.
        """
        need = self._need(cell, ask)
        waiting = self._waiting
        if waiting is not None and waiting.old and waiting.need != need and self.host.opens(waiting.need):
            return None
        try:
            lease = self.host.take(need, self._waiting)
        except (ValueError, RuntimeError, OSError):
            self._waited(need)
            return True  # the attempt meets it again, and its row says so
        if lease is None:
            self._waiting = self._waiting or Ticket(need)
            self._waiting.age()
            return False
        self._reserved[cell.key] = lease
        self._waited(need)
        return True

    def _waited(self, need: Need) -> None:
        """No longer keep free what was waited for, if it was `need`."""
        if self._waiting is not None and self._waiting.need == need:
            self._waiting.close()
            self._waiting = None

    def _need(self, cell: Cell, ask: bool) -> Need:
        """What a server takes. One that is to be refused, and so not asked, ends before its ranks start."""
        need = need_of(cell, self.host.room.cores)
        return need if ask or cell.hardware != "cpu" else need.model_copy(update={"cores": 1})

    def give_back(self) -> None:
        """Release what is reserved and was not used."""
        for key in list(self._reserved):
            self._reserved.pop(key).release()
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def attempt(self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool = True) -> Attempt:
        """Start `cell` in `folder` (log, proofs, workload, transcript), ask its workload following `follow`, and stop.

        Without `ask` it is stopped as soon as it is ready. Server failures are in the attempt;
        RuntimeError (no port), ValueError (this host lacks what it takes), Cancelled and OSError are raised.
        """
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        phases: list[Phase] = []
        with _timed("lease", phases):
            lease = self._reserved.pop(cell.key, None)
            lease = lease or self.host.wait(self._need(cell, ask), self.cancel)
        try:
            attempt = self._served(cell, folder, follow, ask, lease, phases)
        finally:
            with _timed("release", phases):
                stuck = lease.release()
        attempt = attempt._replace(phases=tuple(phases))
        if stuck and attempt.failure is None:
            failure = Failure(cause=Cause.GPU_MEMORY, reason=stuck, log_tail=attempt.log_tail)
            return attempt._replace(failure=failure)
        if stuck:
            failure = attempt.failure.model_copy(update={"reason": f"{attempt.failure.reason}; {stuck}"})
            return attempt._replace(failure=failure)
        return attempt

    def _served(
        self, cell: Cell, folder: Path, follow: Transcript | None, ask: bool, lease: Lease, phases: list[Phase]
    ) -> Attempt:
        started, failure, transcript, again = False, None, None, None
        log = folder / "server.log"
        with _timed("model", phases):
            launch = self.place.launch(cell, folder, lease.port, lease.gpus)
        server = Server(launch, log, self.limits, self.cancel, lease.descriptor)
        self._live.add(server)
        try:
            with _timed("imports", phases):
                server.warm_up()
            with _timed("start", phases):
                server.start()
            started = True
            if ask:
                workload = workload_for(cell)
                (folder / "workload.json").write_text(workload.model_dump_json())  # for other engines to answer
                with _timed("workload", phases):
                    transcript = answer_all(server, cell, workload, dtype_of(cell), follow)
                transcript.save(folder / "transcript.json")
                # On CPU rows of a batch do not change each other's sums (seen identical): nothing to measure.
                if cell.baseline and cell.hardware != "cpu":
                    with _timed("null band", phases):
                        again = _answer_in_other_batches(server, cell, workload)
                    again.save(folder / "again.json")
        except ServerFailed as failed:
            failure = failed.failure
        finally:
            proofs = tuple(read_proofs(launch.proof_dir)) if launch.proof_dir else ()
            with _timed("stop", phases):
                server.stop()
            self._live.discard(server)
        return Attempt(started, failure, transcript, proofs, server.kv_cache_tokens(), tail(read_log(log)), (), again)

    def end_all(self) -> None:
        """Kill every running server now, without grace."""
        self.cancel.set()
        self.give_back()
        for server in list(self._live):
            server.stop(now=True)


def _answer_in_other_batches(server: Server, cell: Cell, workload: Workload) -> Transcript:
    """The same prompts once more, in other batches."""
    answers = answer_all(server, cell, in_other_batches(workload), dtype_of(cell))
    return answers.model_copy(update={"workload_key": workload.key})


def in_other_batches(workload: Workload) -> Workload:
    """`workload` where what was asked alone goes together, and what went together goes in threes: far smaller batches,
    and not one request after the other, which takes minutes where ranks share a GPU."""
    place = itertools.count()
    prompts = tuple(
        prompt.model_copy(update={"batch": 2 + next(place) // SMALL_BATCH if prompt.batch else 1})
        for prompt in workload.prompts
    )
    return workload.model_copy(update={"prompts": prompts})


def workload_for(cell: Cell) -> Workload:
    """What `cell` is asked. KeyError for an unknown recipe, ValueError where its context is too short."""
    model = shape_of(cell.model)
    return workload_of(cell, model.vocab_size, model.max_position_embeddings)


def shape_of(model: str):
    """The ModelShape of a recipe or of a hub model whose shape is committed."""
    if model.startswith(PREFIX):
        return shape(model)
    from helix_runtime.shapes import load_shape

    return load_shape(model)


def dtype_of(cell: Cell) -> str:
    """The dtype that the cell's server computes in; vLLM's `auto` is fp32 for our recipes and bf16 for hub models."""
    asked = str(dict(cell.serve).get("dtype", "auto"))
    if asked != "auto":
        return {"float": "float32", "half": "float16"}.get(asked, asked)
    return "float32" if cell.model.startswith(PREFIX) else "bfloat16"


@contextmanager
def _timed(name: str, phases: list[Phase]) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        phases.append(Phase(name=name, seconds=round(time.monotonic() - began, 3)))
