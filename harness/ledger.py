"""The ledger of a run: append-only NDJSON, one event a line, on disk before the next step is taken."""

import json
import lzma
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from pydantic_core import from_json

from harness.result import CellResult

NAME = "ledger.ndjson"
PACKED = f"{NAME}.xz"  # how committed evidence keeps it


class Ledger:
    """Writes `run_dir/ledger.ndjson`. Safe for threads; every line is written whole and synced."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / NAME
        self._lock = threading.Lock()

    def run_start(self, run: str, planned: list[str], hardware: list[str], argv: list[str]) -> None:
        self._append({"event": "run-start", "run": run, "planned": planned, "hardware": hardware, "argv": argv})

    def cell_start(self, cell_id: str) -> None:
        self._append({"event": "cell-start", "id": cell_id})

    def result(self, result: CellResult) -> None:
        self._append({"event": "result", "result": result.model_dump(mode="json")})

    def run_end(self) -> None:
        self._append({"event": "run-end"})

    def _append(self, event: dict) -> None:
        line = (json.dumps({**event, "time": now()}) + "\n").encode()
        with self._lock:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _torn(descriptor):
                    line = b"\n" + line
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def find(run_dir: Path) -> Path:
    """The ledger in `run_dir`: plain, or packed where only that is there. It need not exist."""
    plain, packed = run_dir / NAME, run_dir / PACKED
    return packed if packed.exists() and not plain.exists() else plain


def read_bytes(path: Path) -> bytes:
    """The ledger's lines, unpacked. OSError where it cannot be read, a damaged packed file included."""
    if path.suffix != ".xz":
        return path.read_bytes()
    try:
        return lzma.decompress(path.read_bytes())
    except lzma.LZMAError as problem:
        raise OSError(f"not a whole xz file: {problem}") from problem


def read(path: Path) -> tuple[list[dict], list[str]]:
    """(events, warnings). A torn last line, as a crash leaves it, is a warning, and so is any line that is no event."""
    events: list[dict] = []
    warnings: list[str] = []
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = _value(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("no event")
            events.append(event)
        except ValueError as error:
            torn = "torn last line" if number == len(lines) else f"not an event ({error})"
            warnings.append(f"{path.name}:{number}: {torn}")
    return events, warnings


def _value(line: bytes) -> object:
    """pydantic's parser, which is several times as fast; json's for what only that accepts, as unpaired surrogates."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line)


def results(events: list[dict]) -> list[CellResult]:
    """The results among `events`, in order. Raises pydantic's ValidationError on a foreign record."""
    return [CellResult.model_validate(event["result"]) for event in events if event["event"] == "result"]


def now() -> str:
    """ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _torn(descriptor: int) -> bool:
    """Whether the file ends in the middle of a line, after a crash; then a new line comes first."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
