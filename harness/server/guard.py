"""The guard: the small parent of one server, which sees to it that nothing outlives the server.

`python -m harness.server.guard --grace 10 -- COMMAND …`. It runs the command in its own session, becomes the parent of
every orphan below it, and ends the whole tree when the command ends, when `stop` or `kill` comes on its standard input,
or when that pipe closes, which is what happens when the harness dies, even by `kill -9`. Then it removes the shared
memory and the temporary files that the tree left, and exits with the command's status.
"""

import argparse
import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from harness.server.memory_kills import MemoryKills

SHM = "/dev/shm/"
#: Names that vLLM and multiprocessing give to shared memory; only such orphans are swept without having been seen.
#: Not `sem.mp-`: glibc maps a semaphore under another name, so one in use elsewhere cannot be told from an orphan.
ORPHAN = re.compile(r"^(vllm_dist_.*cpushm|psm_|nccl-|torch_)")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: What is read of a log, and kept: its beginning, where settings stand, and its end, where causes do.
HEAD_BYTES, TAIL_BYTES = 2**20, 4 * 2**20
#: A log that grew by this is cut in its middle.
LOG_BYTES = 64 * 2**20
_LIBC = ctypes.CDLL(None, use_errno=True)


class Tree:
    """The processes below this one, and the shared memory they were seen to use."""

    def __init__(self) -> None:
        self.me = psutil.Process()
        self.born = time.time()
        self.shared: set[str] = set()

    def processes(self) -> list[psutil.Process]:
        """The living ones; a zombie holds nothing and waits only to be collected."""
        return [process for process in self.me.children(recursive=True) if _alive(process)]

    def look(self) -> None:
        """Note which files in /dev/shm the tree maps or holds open now."""
        for process in self.processes():
            self.shared |= shared_memory(process.pid)

    def kill(self, patience: float = 5.0) -> None:
        """SIGKILL everything, again and again until nothing is left."""
        until = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            reap()
            time.sleep(0.02)

    def sweep(self) -> None:
        sweep(self.shared, self.born)


def scratch_prefix(guard: int) -> str:
    """How the name of the temporary folder begins that the guard with this PID makes; short: vLLM puts unix sockets
    there."""
    return f"hx-{guard}-"


def sweep(shared: set[str], born: float) -> None:
    """Remove this shared memory, and orphans of the known names that are younger than `born` (seconds of the epoch).

    A file that any living process still maps belongs to someone else and stays. What is there is listed before its
    users are looked for: what another server makes meanwhile is not in the list.
    """
    there = [(path, status) for path in Path(SHM).iterdir() if (status := _status(path))]
    living = set().union(*(shared_memory(pid) for pid in psutil.pids()))
    for path, status in there:
        orphan = ORPHAN.match(path.name) and status.st_uid == os.getuid() and status.st_ctime >= born - 1
        if (str(path) in shared or orphan) and str(path) not in living:
            with contextlib.suppress(OSError):
                path.unlink()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def shared_memory(pid: int) -> set[str]:
    """Paths in /dev/shm that process `pid` maps or holds open; none when it is gone or another user's."""
    found: set[str] = set()
    with contextlib.suppress(OSError):  # before the maps: a file is mapped first and closed then
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if (target := os.readlink(entry.path)).startswith(SHM):
                    found.add(target.removesuffix(" (deleted)"))
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if SHM in line:
                found.add(line[line.index(SHM) :].removesuffix(" (deleted)"))
    return found


def reap() -> None:
    """Collect adopted children that have ended; the command itself is collected by its Popen."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() == psutil.STATUS_ZOMBIE and process.pid != _command_pid:
                os.waitpid(process.pid, os.WNOHANG)


_command_pid = 0


class Process(Protocol):
    """What the guard needs of a server's first process; `subprocess.Popen` is one. A negative status is a signal's."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def terminate(self) -> None: ...


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def guard(start: Callable[[dict[str, str]], Process], grace: float) -> int:
    """See what `start` makes of an environment to its end, or end it when told to; its exit status, 128 + n after
    signal n."""
    global _command_pid
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tree = Tree()
    scratch = tempfile.mkdtemp(prefix=scratch_prefix(os.getpid()))
    told, log = Told(), Log()
    try:
        process = start(os.environ | {"TMPDIR": scratch})
        _command_pid = process.pid
        looked, killed = 0.0, MemoryKills(process.pid)
        while process.poll() is None and not told.stop(0.1):
            reap()
            log.shorten()
            killed.look()
            if time.monotonic() - looked > 1.0:
                tree.look()
                looked = time.monotonic()
        tree.look()
        if process.poll():
            time.sleep(0.05)
            if kill := killed.told():
                print(f"guard: {kill}", file=sys.stderr, flush=True)
        if process.poll() is None:
            process.terminate()
            until = time.monotonic() + grace
            while process.poll() is None and time.monotonic() < until and not told.kill(0.05):
                reap()
        tree.kill()
        status = process.wait()
        return 128 - status if status < 0 else status
    except OSError as error:
        print(f"guard: cannot start the server: {error}", file=sys.stderr)
        return 127
    finally:
        tree.kill()
        tree.sweep()
        shutil.rmtree(scratch, ignore_errors=True)


class Log:
    """The server's log, which is this process's standard output. A flood is cut in the middle, where nobody reads."""

    _PUNCH_KEEPING_SIZE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

    def __init__(self) -> None:
        self.cut = HEAD_BYTES

    def shorten(self, at: int = LOG_BYTES) -> None:
        """Give the disk back what lies between the first and the last part of a log that has grown by `at` bytes."""
        status = os.fstat(1)
        end = (status.st_size - TAIL_BYTES) & ~0xFFF
        if stat.S_ISREG(status.st_mode) and end - self.cut > at:
            _LIBC.fallocate(1, self._PUNCH_KEEPING_SIZE, ctypes.c_long(self.cut), ctypes.c_long(end - self.cut))
            self.cut = end


class Told:
    """What the harness says on standard input, and SIGTERM. `stop` and `kill` wait up to `seconds` for a word."""

    def __init__(self) -> None:
        self.words = b""
        self.closed = False
        signal.signal(signal.SIGTERM, self._signalled)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _signalled(self, _signal: int, _frame: object) -> None:
        self.words += b"stop\n"

    def stop(self, seconds: float) -> bool:
        self._listen(seconds)
        return self.closed or bool(self.words)

    def kill(self, seconds: float) -> bool:
        self._listen(seconds)
        return b"kill" in self.words

    def _listen(self, seconds: float) -> None:
        if self.closed:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            heard = os.read(0, 64)
            self.words += heard
            self.closed = not heard


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a command so that nothing of it outlives it.")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    def start(env: dict[str, str]) -> subprocess.Popen:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, preexec_fn=end_with_parent)

    return guard(start, options.grace)


if __name__ == "__main__":
    sys.exit(main())
