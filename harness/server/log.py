"""What a server's log tells: why it died, in one typed reason; its KV cache size; its tail."""

import os
import re
from enum import StrEnum
from pathlib import Path

from harness.frozen import Frozen
from harness.server.guard import HEAD_BYTES, TAIL_BYTES

TAIL_LINES = 40
_LINE = 2000  # characters of a line that are shown


class Cause(StrEnum):
    """Why a server did not start or did not go on."""

    REFUSED = "refused"  # by a rule of ours, which is a statement about the cell
    OUT_OF_MEMORY = "out of memory"
    KILLED = "killed"
    PORT_IN_USE = "port in use"
    MISSING_MODEL = "missing model"
    NCCL = "NCCL"
    ILLEGAL_ACCESS = "illegal memory access"
    GPU_MEMORY = "GPU memory not given back"
    DAEMON = "container daemon"
    MISSING_IMAGE = "missing image"
    TIMEOUT = "deadline passed"
    BROKEN_ANSWER = "broken answer"
    INTERRUPTED = "interrupted"
    OTHER = "other"


class Failure(Frozen):
    """`reason` is one sentence for the reader; for a refusal it is the rule's own text."""

    cause: Cause
    reason: str
    log_tail: str = ""


#: The API process prints our refusals as an exception's last line.
_REFUSAL = re.compile(r"(?:^|[\s.])(?:HelixRefusal|LayoutError)[^:\n]*: (.*)$", re.MULTILINE)
_CAUSES = (
    (Cause.MISSING_IMAGE, re.compile(r"^container: there is no image", re.MULTILINE)),
    (Cause.DAEMON, re.compile(r"^container: the Docker daemon", re.MULTILINE)),
    (Cause.OUT_OF_MEMORY, re.compile(r"OutOfMemoryError|out of memory|Cannot allocate memory|bad_alloc|MemoryError")),
    (Cause.ILLEGAL_ACCESS, re.compile(r"illegal memory access|misaligned address|device-side assert")),
    (
        Cause.NCCL,
        re.compile(
            r"NCCL error|nccl(?:UnhandledCuda|System|Internal|Remote|InvalidUsage)Error|DistBackendError"
            r"|ProcessGroupNCCL.*(?:[Tt]imeout|exception)|Watchdog caught collective operation timeout"
        ),
    ),
    (Cause.PORT_IN_USE, re.compile(r"[Aa]ddress already in use|EADDRINUSE|port is already allocated")),
    (
        Cause.MISSING_MODEL,
        re.compile(
            r"RepositoryNotFound|LocalEntryNotFound|not a valid model identifier|[Cc]an't load|No such file.*model"
        ),
    ),
)
_ERROR_LINE = re.compile(
    r"^(?:\([^)]*\)\s*)?(?:\S+ [\d-]+ [\d:]+ \[[^\]]*\]\s*)?((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$"
)
#: Errors that only wrap the one below them.
_WRAPPERS = ("See root cause above", "Worker failed with error", "WorkerProc initialization failed")
_KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def read_log(path: Path) -> str:
    """The log without colours: its first and last part where it is large. Empty when there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        data = file.read(HEAD_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(HEAD_BYTES, size - TAIL_BYTES))
        rest = file.read(TAIL_BYTES)
    cut = size - len(data) - len(rest)
    middle = f"\n… {cut} bytes of the log are left out …\n".encode() if cut > 0 else b""
    return _COLOUR.sub("", (data + middle + rest).decode(errors="replace"))


def tail(text: str, lines: int = TAIL_LINES) -> str:
    return "\n".join(line if len(line) <= _LINE else f"{line[:_LINE]} …" for line in text.splitlines()[-lines:])


def explain(text: str, status: int | None) -> Failure:
    """The typed reason in a dead server's log. A refusal wins, then the known causes, then the last error line."""
    if refusals := _REFUSAL.findall(text):
        return Failure(cause=Cause.REFUSED, reason=refusals[-1].strip(), log_tail=tail(text))
    errors = [match[1] for line in text.splitlines() if (match := _ERROR_LINE.match(line))]
    for cause, pattern in _CAUSES:
        if found := [line.strip() for line in text.splitlines() if pattern.search(line)]:
            return Failure(cause=cause, reason=found[-1][:_LINE], log_tail=tail(text))
    if status in (137, -9):  # of the server, or of its guard
        reason = "SIGKILL (137) from outside, and not for want of memory"
        return Failure(cause=Cause.KILLED, reason=reason, log_tail=tail(text))
    roots = [error for error in errors if not any(wrapper in error for wrapper in _WRAPPERS)] or errors
    said = roots[-1] if roots else next((line for line in reversed(text.splitlines()) if line.strip()), "empty log")
    return Failure(cause=Cause.OTHER, reason=f"exit status {status}: {said[:_LINE]}", log_tail=tail(text))


def kv_cache_tokens(text: str) -> int | None:
    """Global tokens that the KV cache holds, as vLLM logs it; None when it does not say."""
    found = _KV_TOKENS.findall(text)
    return int(found[-1].replace(",", "")) if found else None
