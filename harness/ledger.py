"""The ledger of a run: append-only NDJSON, one event a line, on disk before the next step is taken."""

import contextlib
import fcntl
import io
import json
import lzma
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pydantic_core import from_json

from harness.redact import clean_of_secrets
from harness.result import CellResult

NAME = "ledger.ndjson"
PACKED = f"{NAME}.xz"  # how committed evidence keeps it


class LedgerBusy(Exception):
    """Another harness is writing this run."""


class Ledger:
    """Writes `run_dir/ledger.ndjson`. Safe for threads; every line is written whole and synced, or not at all.

    Raises OSError when the disk is full or the folder cannot be written; what was written before stays readable.
    """

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / NAME
        self._lock = threading.Lock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other harnesses out of this run meanwhile, however this one ends. Raises LedgerBusy."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise LedgerBusy(f"another harness is writing {self.path}") from None
        finally:
            os.close(descriptor)

    def run_start(
        self,
        run: str,
        planned: list[str],
        hardware: list[str],
        argv: list[str],
        chosen: dict | None = None,
        kept: list[str] | None = None,
        setting: dict | None = None,
    ) -> None:
        """`chosen`: what selects the cells again; `kept`: ids that a resumed run does not run again; `setting`:
        `harness.resume.Setting`."""
        resumed = {} if kept is None else {"resumed": True, "kept": kept}
        more = {"argv": argv, "chosen": chosen or {}, **resumed, **({"setting": setting} if setting else {})}
        self._append({"event": "run-start", "run": run, "planned": planned, "hardware": hardware, **more})

    def cell_start(self, cell_id: str) -> None:
        self._append({"event": "cell-start", "id": cell_id})

    def attempt(self, cell_id: str, key: str, number: int, verdict: str, reason: str, cause: str | None) -> None:
        """One attempt at a cell, judged or lost. `key`: `harness.resume.fingerprint`; `cause`: a failed server's."""
        told = {"id": cell_id, "key": key, "number": number, "verdict": verdict, "reason": reason, "cause": cause}
        self._append({"event": "attempt", **told})

    def result(self, result: CellResult, key: str = "") -> None:
        """A cell's row; the last one of a cell counts. `key`: `harness.resume.fingerprint`."""
        self._append({"event": "result", "key": key, "result": result.model_dump(mode="json")})

    def models(self, cards: list[dict]) -> None:
        """The cards of the run's models (`harness.models.sheet.ModelCard`); the last record counts."""
        self._append({"event": "models", "models": cards})

    def run_end(self) -> None:
        """With what this process itself took: its CPU seconds, and the most memory it held (bytes)."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        took = {"cpu_seconds": round(used.ru_utime + used.ru_stime, 3), "peak_bytes": used.ru_maxrss * 1024}
        self._append({"event": "run-end", **took})

    def _append(self, event: dict) -> None:
        line = (
            json.dumps({**clean_of_secrets(event), "time": now(), "clock": round(time.monotonic(), 3)}) + "\n"
        ).encode()
        with self._lock:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(descriptor).st_size
            try:
                if _torn(descriptor):
                    line = b"\n" + line
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            except OSError as problem:
                with contextlib.suppress(OSError):  # half a line would only confuse
                    os.ftruncate(descriptor, size)
                raise OSError(problem.errno, problem.strerror, str(self.path)) from problem
            finally:
                os.close(descriptor)
            if new:
                _sync_folder(self.path.parent)


def find(run_dir: Path) -> Path:
    """The ledger in `run_dir`: plain, or packed where only that is there. It need not exist."""
    plain, packed = run_dir / NAME, run_dir / PACKED
    return packed if packed.exists() and not plain.exists() else plain


def opened(path: Path) -> BinaryIO:
    """The ledger's lines, unpacked. OSError where it cannot be read, a damaged packed file included."""
    if path.suffix != ".xz":
        return path.open("rb")
    try:
        return io.BytesIO(lzma.decompress(path.read_bytes()))
    except lzma.LZMAError as problem:
        raise OSError(f"not a whole xz file: {problem}") from problem


def read(path: Path) -> tuple[list[dict], list[str]]:
    """(events, warnings). A torn last line, as a crash leaves it, is a warning, and so is any line that is no event."""
    events: list[dict] = []
    warnings: list[str] = []
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                event = _value(line)
                if not isinstance(event, dict) or "event" not in event:
                    raise ValueError("no event")
                events.append(event)
            except ValueError as error:
                torn = f"not an event ({error})" if line.endswith(b"\n") else "torn last line"
                warnings.append(f"{path.name}:{number}: {torn}")
    return events, warnings


def _value(line: bytes) -> object:
    """By pydantic's parser, which is several times as fast as json's. What only that accepts, as an unpaired surrogate,
    is mended first: else it breaks whatever writes it."""
    try:
        return from_json(line)
    except ValueError:
        return from_json(json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace"))


def results(events: list[dict]) -> list[CellResult]:
    """The results among `events`, in order. Raises pydantic's ValidationError on a foreign record."""
    return [CellResult.model_validate(event["result"]) for event in events if event["event"] == "result"]


def clock_jumps(events: list[dict], tolerance: float = 5.0) -> list[str]:
    """A sentence for each step of the wall clock that the steady clock did not make, within one session of a run."""
    told: list[str] = []
    before: tuple[datetime, float] | None = None
    for event in events:
        try:
            here = (datetime.fromisoformat(event["time"]), float(event["clock"]))
        except (KeyError, TypeError, ValueError):
            continue
        if before and event["event"] != "run-start":  # the steady clock starts anew with the host
            jump = (here[0] - before[0]).total_seconds() - (here[1] - before[1])
            if abs(jump) > tolerance:
                word = "forward" if jump > 0 else "back"
                told.append(f"the host's clock jumped {word} by {abs(jump):.0f} s before {event['time']}")
        before = here
    return told


def now() -> str:
    """ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _torn(descriptor: int) -> bool:
    """Whether the file ends in the middle of a line, after a crash; then a new line comes first."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _sync_folder(folder: Path) -> None:
    """A new file survives a crash only once its folder is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
