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
#: What stands before a line of vLLM's: `(Worker pid=7) ERROR 11-24 02:19:15 [core.py:12] `; group 1 is the process.
_PREFIX = r"^(?:\(([^)]*)\)\s*)?(?:\S+ [\d-]+ [\d:]+ \[[^\]]*\]\s*)?"
_ERROR_LINE = re.compile(_PREFIX + r"((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$")
_FRAME = re.compile(_PREFIX + r'\s*File "([^"]+)", line (\d+), in (.+)$')
_SOURCE = re.compile(_PREFIX + r"\s*(.*)$")
#: An error that only has a name: an `assert` without a message, say.
_BARE = re.compile(r"[\w.]+:?\s*$")
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


def tail(text: str, lines: int = TAIL_LINES, root: int | None = None) -> str:
    """The last lines; where the line `root`, that tells why, lies before them, half of them around that one instead."""
    found = text.splitlines()
    kept = found[-lines:]
    if root is not None and root < len(found) - lines:
        half = lines // 2
        first = max(0, root - half + 4)
        around, end = found[first : root + 4], found[-half:]
        cut = len(found) - half - (root + 4)
        kept = [*around, f"… {cut} lines are left out …", *end] if cut > 0 else found[first:]
    return "\n".join(line if len(line) <= _LINE else f"{line[:_LINE]} …" for line in kept)


def explain(text: str, status: int | None) -> Failure:
    """The typed reason in a dead server's log. A refusal wins, then the known causes, then the last error line."""
    lines = text.splitlines()
    if refusals := _REFUSAL.findall(text):
        return Failure(cause=Cause.REFUSED, reason=refusals[-1].strip(), log_tail=tail(text))
    for cause, pattern in _CAUSES:
        if found := [place for place, line in enumerate(lines) if pattern.search(line)]:
            reason = lines[found[-1]].strip()[:_LINE]
            return Failure(cause=cause, reason=reason, log_tail=tail(text, root=found[-1]))
    if status in (137, -9):  # of the server, or of its guard
        reason = "SIGKILL (137) from outside, and not for want of memory"
        return Failure(cause=Cause.KILLED, reason=reason, log_tail=tail(text))
    errors = [(place, match[2]) for place, line in enumerate(lines) if (match := _ERROR_LINE.match(line))]
    roots = [one for one in errors if not any(wrapper in one[1] for wrapper in _WRAPPERS)] or errors
    if roots:
        root, said = roots[-1]
        said += _where(lines, root) if _BARE.fullmatch(said) else ""
    else:
        root, said = None, next((line for line in reversed(lines) if line.strip()), "empty log")
    reason = f"exit status {status}: {said[:_LINE]}"
    return Failure(cause=Cause.OTHER, reason=reason, log_tail=tail(text, root=root))


def _where(lines: list[str], root: int) -> str:
    """` in FILE, line N, FUNCTION: SOURCE`, from the traceback that line `root` ends; empty without one."""
    process = _SOURCE.match(lines[root])[1]
    source = ""
    for line in reversed(lines[:root]):
        if _SOURCE.match(line)[1] != process:  # another process wrote in between
            continue
        if frame := _FRAME.match(line):
            file = frame[2].rpartition("site-packages/")[2]
            return f" in {file}, line {frame[3]}, {frame[4]}" + (f": {source}" if source else "")
        if not (told := _SOURCE.match(line)[2]).strip("^~ "):
            continue
        if _ERROR_LINE.match(line):  # of another traceback
            return ""
        source = told
    return ""


def kv_cache_tokens(text: str) -> int | None:
    """Global tokens that the KV cache holds, as vLLM logs it; None when it does not say."""
    found = _KV_TOKENS.findall(text)
    return int(found[-1].replace(",", "")) if found else None
